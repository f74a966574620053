"""Records, images and conversations: everything between a file and the model's inputs."""
