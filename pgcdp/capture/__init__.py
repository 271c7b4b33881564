"""Floor 3: captured writes, from the engine's journal to the volumes under Postgres."""
