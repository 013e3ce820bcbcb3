"""Where parameters go: gains over a base against what they cost, and one sparse budget divided in several ways."""
