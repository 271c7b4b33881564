"""The parts of the agent: each does one thing, knows nothing of the others, and `pgcdp.agent` ties them together."""
