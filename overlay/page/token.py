"""Who may open the page where others than this node reach it, and who may send probes from it: by a token."""

from __future__ import annotations


def token_of(secret: bytes) -> str:
    """Of the secret that agents share: who has the one has the other, not the other way round."""
    import hmac

    return hmac.new(secret, b"page", "sha256").hexdigest()[:32]
