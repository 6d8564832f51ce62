"""What is made of an evaluation: numbers, tables, pictures and the page."""
