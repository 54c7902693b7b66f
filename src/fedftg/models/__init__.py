"""Image classifiers, and a module as a function of its parameters. See docs/models.md."""
