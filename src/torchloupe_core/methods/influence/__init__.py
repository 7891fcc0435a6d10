"""Which training images a prediction rests on: the question made ready, and the methods that answer it."""
