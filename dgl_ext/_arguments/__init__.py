"""What a user may pass in: the heads there are, and checks of all arguments."""
