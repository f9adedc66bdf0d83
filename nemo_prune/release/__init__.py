"""What is published, and the report that is not: weights, record, card, licence."""
