"""Everything that touches a Hugging Face model: its hidden state, its loading, and students cut from it."""
