"""The far side: loads a model, runs calls on it one at a time, and keeps what they show until it is fetched."""
