"""What the embedding steps share: models, cached encoding, transforms, publishing; and the methods of step 5."""
