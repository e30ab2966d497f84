"""Agents without a language model: studies as scripts, played to the MCP server directly or through a stub endpoint."""
