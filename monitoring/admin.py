"""Has each page of the admin register itself."""

from monitoring import (  # noqa: F401
    admin_drift,
    admin_jobs,
    admin_review,
    admin_shadow,
    admin_versions,
)
