"""The registry of model versions: which were built, from what, and which of them answers.

Rows only; who is let through which gate is decided in ``monitoring``, and ``registry`` changes
states. Without an active row the model of the settings answers.
"""

from __future__ import annotations

from django.conf import settings
from django.core.validators import MaxValueValidator
from django.db import models
from django.db.models import Q
from django.utils import timezone


class ModelVersion(models.Model):
    """One built model folder, known by the digest of its weights."""

    class State(models.TextChoices):
        CANDIDATE = "candidate"  # built; has passed nothing
        SHADOW = "shadow"  # answers beside the active one; nobody sees it
        CANARY = "canary"  # answers a share of conversations
        ACTIVE = "active"
        RETIRED = "retired"  # was active; may become so again
        REJECTED = "rejected"  # stopped at a gate

    name = models.CharField(max_length=60)
    version = models.CharField(max_length=40)
    sha256 = models.CharField(
        max_length=64, unique=True, help_text="Manifest.digest of its folder."
    )
    folder = models.CharField(max_length=500)
    state = models.CharField(max_length=10, choices=State, default=State.CANDIDATE)
    #: Share of conversations, in percent, while it is the canary.
    canary_percent = models.PositiveSmallIntegerField(
        default=0, validators=[MaxValueValidator(100)]
    )
    parent = models.ForeignKey(
        "self", on_delete=models.SET_NULL, null=True, blank=True, related_name="children"
    )
    #: Digest of what it was trained on, if its model.json says so.
    data_sha256 = models.CharField(max_length=64, blank=True, default="")
    #: What each gate measured: {"golden": {...}, "shadow": {...}, "canary": {...}}.
    gates = models.JSONField(default=dict, blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    changed_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["-created_at", "-id"]
        constraints = [
            models.UniqueConstraint(
                fields=["state"],
                condition=Q(state__in=["shadow", "canary", "active"]),
                name="one_model_each",
            )
        ]

    def __str__(self) -> str:
        return self.label

    @property
    def label(self) -> str:
        """As turns record it."""
        return f"{self.name}@{self.version}"


class VersionChange(models.Model):
    """Who moved a version from which state to which, and why. Never changed, never deleted."""

    version = models.ForeignKey(ModelVersion, on_delete=models.PROTECT, related_name="changes")
    from_state = models.CharField(max_length=10, choices=ModelVersion.State, blank=True)
    to_state = models.CharField(max_length=10, choices=ModelVersion.State)
    #: Nobody: a gate or the roll-back did.
    by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, blank=True, related_name="+"
    )
    forced = models.BooleanField(default=False)
    why = models.CharField(max_length=500)
    at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["-at", "-id"]

    def __str__(self) -> str:
        return f"{self.version}: {self.from_state or 'new'} -> {self.to_state}"
