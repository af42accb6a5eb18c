"""What other training frameworks need to run the trainers. Each module needs its framework installed."""
