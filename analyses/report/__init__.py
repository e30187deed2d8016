"""All analyses of one capture on one page."""
