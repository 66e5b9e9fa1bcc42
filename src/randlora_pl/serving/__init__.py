"""HTTP serving of an adapter with LitServe: `uploads` reads images, `api` classifies them, `app` is the server."""
