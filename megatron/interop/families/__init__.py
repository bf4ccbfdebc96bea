"""Model families of Hugging Face, one file each, and the table that lists them."""
