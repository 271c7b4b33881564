"""Everything that knows Postgres: its programs, data directories, control file and sessions."""
