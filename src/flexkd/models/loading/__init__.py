"""Models as they are stored: found, loaded, checked, adapted and saved."""
