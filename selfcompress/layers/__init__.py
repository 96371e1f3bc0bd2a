"""What takes the places of torch's layers: it quantises its weight, and can lose channels."""
