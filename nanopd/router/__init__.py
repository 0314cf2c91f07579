"""Which worker serves a request, and the bookkeeping of requests across workers."""
