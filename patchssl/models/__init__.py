"""One string becomes a Backbone."""
