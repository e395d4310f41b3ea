"""The search for the values of methods: which are tried next, one trial of them, and what is chosen."""
