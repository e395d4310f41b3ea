"""Tests of flexkd; folders mirror src/flexkd."""
