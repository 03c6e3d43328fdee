"""What policies need beside the loop: who brings them, who says that pods come and go, and all that is known of them for who
asks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from overlay.api import serve
from overlay.settings.settings import Settings


def feeds(settings: Settings, post: Callable[[Any], None]) -> Any:
    """Who brings policies, and what they mean, when that is asked for."""
    if settings.kube:
        from lease.kube.client import KubeSettings
        from overlay.policy.kube import KubeFeeds

        return KubeFeeds(KubeSettings(settings.kube_api_url, settings.kubeconfig), post)
    from overlay.policy.feeds import FolderFeed

    return FolderFeed(settings.policy_dir, post)


def attachments(settings: Settings, post: Callable[[Any], None]) -> list[threading.Thread]:
    """Who says when pods are attached, where policies wait for that."""
    from overlay.cni.watch import ResultsThread

    return [ResultsThread(settings.cni_results_dir, post)] if settings.knows_policies else []


def answer(settings: Settings, post: Callable[[Any], None]) -> serve.Answer:
    """All that is known of policies, pods and namespaces, from the loop itself."""
    from overlay.policy.controller import PolicyAsked
    from overlay.policy.snapshot import Snapshot, as_json

    if not settings.knows_policies:
        return serve.text(404, "this agent knows no policies: without Kubernetes --policy-dir names their folder")
    told: queue.SimpleQueue[Snapshot] = queue.SimpleQueue()
    post(PolicyAsked(told))
    try:
        return serve.as_json(200, as_json(told.get(timeout=8.0)))
    except queue.Empty:
        return serve.text(503, "the loop is stuck")
