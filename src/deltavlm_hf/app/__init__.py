"""What people look at: the page, the demo's picture, heat maps and cells over images."""
