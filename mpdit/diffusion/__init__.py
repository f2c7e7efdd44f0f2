"""Flow matching around the model: the loss that trains it, the samplers that draw from it, pictures of the result."""
