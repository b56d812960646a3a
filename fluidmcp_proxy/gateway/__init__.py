"""The ASGI face: requests in, bytes out."""
