"""What `pgcdp check` looks at; `pgcdp.doctor` has the list."""
