"""Agents' notebooks: an MCP server, a keeper process per session, the notebook file and its log of attempts.

    agent <- stdio or HTTP -> server <- Unix socket -> keeper <- Jupyter protocol -> kernel -> worker

The server keeps nothing: whatever is of one session lives in its keeper, so that a server may die and come back, and
several may share a session.
"""
