"""Image decoding, transforms, augmentation and the shared cache of decoded images."""
