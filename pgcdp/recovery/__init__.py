"""Floor 6: from what a user asks for to a state that Postgres can start on."""
