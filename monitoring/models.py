"""What monitoring keeps: results, comparisons, judgements, jobs. Figures, and as little text as can
be: a user's words stay in ``Message`` and go with it.
"""

from __future__ import annotations

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.utils import timezone

from assistant.models import ModelVersion
from conversations.models import Message


class Job(models.Model):
    """Work that takes longer than a request: a row first, so that a killed worker is noticed."""

    class Kind(models.TextChoices):
        EVALUATE = "evaluate"
        DRIFT = "drift"
        RETRAIN = "retrain"

    class State(models.TextChoices):
        PROPOSED = "proposed"  # waits for a person's yes
        QUEUED = "queued"
        RUNNING = "running"
        DONE = "done"
        FAILED = "failed"
        CANCELLED = "cancelled"

    OPEN = (State.PROPOSED, State.QUEUED, State.RUNNING)

    kind = models.CharField(max_length=10, choices=Kind)
    state = models.CharField(max_length=10, choices=State, default=State.QUEUED)
    #: Equal work has an equal key: asking for it twice opens one job.
    key = models.CharField(max_length=120, unique=True)
    why = models.CharField(max_length=500, blank=True, default="")
    params = models.JSONField(default=dict, blank=True)
    result = models.JSONField(default=dict, blank=True)
    stage = models.CharField(max_length=40, blank=True, default="")
    progress = models.FloatField(default=0.0, help_text="0 to 1.")
    #: The newest lines; older ones are cut off.
    log = models.TextField(blank=True, default="")
    error = models.CharField(max_length=500, blank=True, default="")
    #: Counts starts; a run that was given up cannot write over the one that followed.
    attempt = models.PositiveSmallIntegerField(default=0)
    version = models.ForeignKey(
        ModelVersion, on_delete=models.SET_NULL, null=True, blank=True, related_name="jobs"
    )
    asked_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, blank=True, related_name="+"
    )
    approved_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, blank=True, related_name="+"
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    started_at = models.DateTimeField(null=True, blank=True)
    heartbeat_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["-created_at", "-id"]
        constraints = [
            models.UniqueConstraint(
                fields=["kind"],
                condition=Q(kind="retrain", state__in=["proposed", "queued", "running"]),
                name="one_open_retraining",
            )
        ]
        indexes = [models.Index(fields=["state", "kind"], name="job_state")]

    def __str__(self) -> str:
        return f"{self.kind} {self.pk}"


class EvaluationRun(models.Model):
    """One model asked one whole suite."""

    job = models.ForeignKey(
        Job, on_delete=models.SET_NULL, null=True, blank=True, related_name="evaluations"
    )
    suite = models.CharField(max_length=60, default="golden")
    #: As turns record it: name@version.
    model = models.CharField(max_length=100)
    version = models.ForeignKey(
        ModelVersion, on_delete=models.SET_NULL, null=True, blank=True, related_name="evaluations"
    )
    trigger = models.CharField(max_length=20, help_text="schedule, candidate, staff or command.")
    rows = models.PositiveIntegerField()
    seconds = models.FloatField()
    #: ``evaluation.report``'s figures; by kind; by intent: {"rows", "right"}.
    figures = models.JSONField(default=dict)
    by_kind = models.JSONField(default=dict)
    by_intent = models.JSONField(default=dict)
    #: Ids of cases that were answered right, to name those that regress.
    right = models.JSONField(default=list)
    failures = models.JSONField(default=list)
    #: Ids right in ``against`` and wrong here.
    regressed = models.JSONField(default=list)
    against = models.ForeignKey(
        "self", on_delete=models.SET_NULL, null=True, blank=True, related_name="+"
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["-created_at", "-id"]
        indexes = [models.Index(fields=["suite", "-created_at"], name="evaluation_recent")]

    def __str__(self) -> str:
        return f"{self.suite} of {self.model}, {self.created_at:%Y-%m-%d %H:%M} UTC"


class GoldenCase(models.Model):
    """A case staff add to the golden set of the files: a question, and what it should be about."""

    #: [{"role", "text"}, ...], the last a user's.
    turns = models.JSONField()
    intent = models.CharField(max_length=60, blank=True, default="")
    scope = models.CharField(max_length=3, choices=[("in", "in"), ("out", "out")], default="in")
    active = models.BooleanField(default=True)
    note = models.CharField(max_length=200, blank=True, default="")
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["id"]

    def __str__(self) -> str:
        return str(self.turns[-1]["text"])[:80] if self.turns else ""


class ShadowPair(models.Model):
    """What a candidate would have said beside what was said. Goes with the message it is about."""

    class Verdict(models.TextChoices):
        AGREE = "agree", "they agree"
        LIVE = "live", "the live answer is better"
        CANDIDATE = "candidate", "the candidate's is better"

    version = models.ForeignKey(ModelVersion, on_delete=models.CASCADE, related_name="pairs")
    message = models.ForeignKey(Message, on_delete=models.CASCADE, related_name="+")
    agreed = models.BooleanField()
    #: In what they differ: "intent", "band", "text", "failed"; empty if they agree.
    differs = models.CharField(max_length=20, blank=True, default="")
    live_model = models.CharField(max_length=100)
    live_intent = models.CharField(max_length=60, blank=True, default="")
    live_confidence = models.FloatField(null=True, blank=True)
    live_tokens = models.PositiveIntegerField(default=0)
    live_ms = models.FloatField(null=True, blank=True)
    intent = models.CharField(max_length=60, blank=True, default="")
    confidence = models.FloatField(null=True, blank=True)
    tokens = models.PositiveIntegerField(default=0)
    ms = models.FloatField(null=True, blank=True)
    #: The candidate's answer; kept only where they disagree.
    text = models.TextField(blank=True, default="")
    similarity = models.FloatField(null=True, blank=True)
    verdict = models.CharField(max_length=10, choices=Verdict, blank=True, default="")
    judged_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, blank=True, related_name="+"
    )
    judged_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["-created_at", "-id"]
        constraints = [
            models.UniqueConstraint(fields=["version", "message"], name="shadow_once"),
        ]
        indexes = [
            models.Index(fields=["version", "agreed", "-created_at"], name="shadow_recent"),
        ]

    def __str__(self) -> str:
        return f"{self.version}, {'agreed' if self.agreed else self.differs}"


class DriftReference(models.Model):
    """What questions looked like in the window to which others are compared; figures only."""

    model = models.CharField(max_length=100, blank=True, default="")
    turns = models.PositiveIntegerField()
    #: Histograms, mean embedding, hashed vocabulary and the fitted thresholds, by feature.
    data = models.JSONField()
    from_at = models.DateTimeField()
    to_at = models.DateTimeField()
    active = models.BooleanField(default=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["-created_at", "-id"]

    def __str__(self) -> str:
        return f"{self.turns} turns until {self.to_at:%Y-%m-%d}"


class DriftReport(models.Model):
    """One window compared to the reference."""

    reference = models.ForeignKey(DriftReference, on_delete=models.CASCADE, related_name="reports")
    turns = models.PositiveIntegerField()
    #: {feature: {"score", "threshold", "breached"}}.
    features = models.JSONField(default=dict)
    breached = models.BooleanField(default=False)
    from_at = models.DateTimeField()
    to_at = models.DateTimeField()
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["-created_at", "-id"]

    def __str__(self) -> str:
        return f"{self.turns} turns until {self.to_at:%Y-%m-%d %H:%M} UTC"


class ReviewItem(models.Model):
    """What staff say of an answer, and what it should have been. Goes with its message."""

    class Verdict(models.TextChoices):
        GOOD = "good"
        BAD = "bad"

    message = models.OneToOneField(
        Message, on_delete=models.CASCADE, primary_key=True, related_name="review"
    )
    verdict = models.CharField(max_length=4, choices=Verdict)
    #: What the question is about and what should have been said; personal values masked.
    intent = models.CharField(max_length=60, blank=True, default="")
    correction = models.TextField(blank=True, default="")
    #: A row of ``train_model --data``: made with the correction, used by at most one retraining.
    as_example = models.BooleanField(default=False)
    as_reviewed = models.BooleanField(default=False)
    used_in = models.ForeignKey(
        Job, on_delete=models.SET_NULL, null=True, blank=True, related_name="examples"
    )
    by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, blank=True, related_name="+"
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["-created_at"]
        indexes = [models.Index(fields=["as_example", "-created_at"], name="review_examples")]

    def __str__(self) -> str:
        return f"{self.verdict}: {self.message_id}"


class Rollup(models.Model):
    """Figures of all answers of one closed period; stays when conversations go."""

    start = models.DateTimeField()
    seconds = models.PositiveIntegerField()
    #: What ``rollups`` counted: by route, reason, model, status; histograms of latencies.
    data = models.JSONField()

    class Meta:
        ordering = ["-start"]
        constraints = [
            models.UniqueConstraint(fields=["start", "seconds"], name="rollup_period"),
        ]

    def __str__(self) -> str:
        return f"{self.start:%Y-%m-%d %H:%M} UTC, {self.seconds} s"
