"""What a build is made of: the plan, who works on it, and the way of each image into a shard."""
