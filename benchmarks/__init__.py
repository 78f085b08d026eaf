"""One script a claim; each prints the table that README shows."""
