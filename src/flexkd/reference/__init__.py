"""Reference of a recipe for editors and documents: its JSON schema, with an example of every key."""
