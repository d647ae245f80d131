"""What an attention call is, for any framework: its options, their rules and errors, and what is said of the choice."""
