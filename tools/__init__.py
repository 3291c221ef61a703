"""What builds and checks the project: the site's processors, the README, saved outputs.

Nothing here is installed with the package."""
