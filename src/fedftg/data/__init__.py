"""Where images come from and who holds them. See docs/data.md."""
