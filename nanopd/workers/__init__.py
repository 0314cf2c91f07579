"""Workers: engines that take messages, and move KV caches to one another."""
