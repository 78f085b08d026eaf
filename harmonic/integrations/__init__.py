"""Other libraries whose models take a head."""
