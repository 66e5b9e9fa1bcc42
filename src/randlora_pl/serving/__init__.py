"""Serving an adapter over HTTP with LitServe: `uploads` reads images, `api` classifies them, `app` is the server."""
