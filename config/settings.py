"""Every setting, in the order a request meets it; each comes from the environment or has a default.

A clone runs with nothing set: SQLite, local memory, the bundled model, a key kept in the data
folder. Each variable is read through one of the ``env_*`` helpers, which fail loudly on a bad value
and note the variable in ``ENVIRONMENT``, from which the README's table is tested. This file does
not know whether it runs a test, a demo or production.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import secrets
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import environ
from django.core.exceptions import ImproperlyConfigured

BASE_DIR = Path(__file__).resolve().parent.parent

# --- Reading the environment ---------------------------------------------------------------------

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Kind = Literal["text", "list", "flag", "whole", "seconds", "share", "rate", "secret"]


@dataclass(frozen=True, slots=True)
class Variable:
    """One line of the README's table."""

    name: str
    kind: Kind
    default: str
    help: str


#: Every environment variable this file reads, by name, in order.
ENVIRONMENT: dict[str, Variable] = {}

_env = environ.Env()
environ.Env.read_env(BASE_DIR / ".env")  # missing is fine; real variables win over the file


def _raw(name: str, kind: Kind, default: str, explain: str) -> str:
    ENVIRONMENT[name] = Variable(name, kind, default, explain)
    return str(_env.str(name, default=default)).strip()


def _bad(name: str, value: str, wanted: str) -> ImproperlyConfigured:
    return ImproperlyConfigured(f"{name}={value!r} is not {wanted}. Correct or unset the variable.")


def env_text(name: str, default: str, explain: str) -> str:
    return _raw(name, "text", default, explain)


def env_secret(name: str, explain: str) -> str:
    return _raw(name, "secret", "", explain)


def env_list(name: str, default: str, explain: str) -> list[str]:
    return [
        part.strip() for part in _raw(name, "list", default, explain).split(",") if part.strip()
    ]


def env_flag(name: str, default: bool, explain: str) -> bool:
    value = _raw(name, "flag", str(default).lower(), explain).lower()
    if value in {"1", "true", "yes", "on"}:
        return True
    if value in {"0", "false", "no", "off"}:
        return False
    raise _bad(name, value, "true or false")


def env_whole(name: str, default: int, explain: str, *, least: int = 0) -> int:
    value = _raw(name, "whole", str(default), explain)
    if not re.fullmatch(r"\d{1,9}", value) or int(value) < least:
        raise _bad(name, value, f"a whole number of at least {least}")
    return int(value)


def env_seconds(name: str, default: float, explain: str) -> float:
    value = _raw(name, "seconds", f"{default:g}", explain)
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", value):
        raise _bad(name, value, "a number of seconds such as 30 or 0.5")
    return float(value)


def env_share(name: str, default: float, explain: str) -> float:
    value = _raw(name, "share", f"{default:g}", explain)
    if not re.fullmatch(r"0(\.\d{1,6})?|1(\.0{1,6})?", value):
        raise _bad(name, value, "a number from 0 to 1 such as 0.6")
    return float(value)


def env_rate(name: str, default: str, explain: str) -> str | None:
    value = _raw(name, "rate", default, explain)
    if value == "off":
        return None
    if not re.fullmatch(r"[1-9]\d{0,6}/([1-9]\d{0,3})?[smhd]", value):
        raise _bad(name, value, "a rate such as 20/m or 500/h, or off")
    return value


def env_networks(name: str, explain: str) -> list[Network]:
    """IPv6 is compared by its /64, as callers are told apart."""
    found: list[Network] = []
    for part in env_list(name, "", explain):
        try:
            network = ipaddress.ip_network(part)
        except ValueError:
            raise _bad(name, part, "a network such as 10.0.0.0/8") from None
        if isinstance(network, ipaddress.IPv6Network) and network.prefixlen > 64:
            if not network.is_loopback:
                raise _bad(name, part, "an IPv6 network of /64 or larger")
            network = network.supernet(new_prefix=64)
        found.append(network)
    return found


# --- Where things are kept -----------------------------------------------------------------------

DATA_DIR = Path(
    env_text("ASSISTANT_DATA_DIR", "var", "Database, queue files, logs, built models.")
).expanduser()
if not DATA_DIR.is_absolute():
    DATA_DIR = BASE_DIR / DATA_DIR


def _data_folder(*parts: str) -> Path:
    return _made(DATA_DIR.joinpath(*parts), "ASSISTANT_DATA_DIR")


def _made(folder: Path, variable: str) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImproperlyConfigured(
            f"The folder {folder} cannot be made ({error.strerror}). "
            f"Set {variable} to a folder this process may write."
        ) from error
    return folder


def _kept_key() -> str:
    """The key of this installation, made on first use; O_EXCL settles a race of two processes."""
    path = _data_folder() / "secret_key"
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _key_in(path)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(secrets.token_urlsafe(50))
    return path.read_text(encoding="ascii").strip()


def _key_in(path: Path) -> str:
    """What another process wrote, or is about to."""
    for _ in range(60):
        if key := path.read_text(encoding="ascii").strip():
            return key
        time.sleep(0.05)
    raise ImproperlyConfigured(f"{path} is empty. Delete it, or set SECRET_KEY.")


# Off unless asked for: a page with tracebacks must never be an accident. A clone still works,
# because static files, the key and the host names below do not depend on it.
DEBUG = env_flag("DEBUG", False, "Show tracebacks in the browser. Never in production.")
SECRET_KEY = env_secret(
    "SECRET_KEY", "Signs cookies. Unset: one is made and kept in the data folder."
)
SECRET_KEY_IS_KEPT = not SECRET_KEY
SECRET_KEY = SECRET_KEY or _kept_key()

# --- The edge: hosts, HTTPS, proxies -------------------------------------------------------------

ALLOWED_HOSTS = env_list(
    "ALLOWED_HOSTS",
    "localhost,127.0.0.1,[::1]",
    "Host names served. Production: your own, never *.",
)
CSRF_TRUSTED_ORIGINS = env_list(
    "CSRF_TRUSTED_ORIGINS", "", "Further origins (with scheme) that may post and open sockets."
)
# How many proxies in front are ours. The client's address is read that many places from the right
# of X-Forwarded-For; with 0 the header is never believed.
ASSISTANT_TRUSTED_PROXIES = env_whole(
    "ASSISTANT_TRUSTED_PROXIES", 0, "Proxies in front of this server that set X-Forwarded-For."
)
ASSISTANT_HTTPS = env_flag(
    "ASSISTANT_HTTPS", False, "Everything over HTTPS: redirect, secure cookies, HSTS for a year."
)
# HTTPS for everybody is production; there what is fine on a laptop ends the start, for no server
# runs ``check --deploy``.
for _name, _careless, _wanted in (
    ("DEBUG", DEBUG, "off"),
    ("ALLOWED_HOSTS", "*" in ALLOWED_HOSTS, "your own host names, without *"),
    ("SECRET_KEY", SECRET_KEY_IS_KEPT, "set, so that all hosts share it"),
    ("SECRET_KEY", SECRET_KEY.startswith("django-insecure-"), "no example but your own"),
    ("SECRET_KEY", len(SECRET_KEY) < 50 or len(set(SECRET_KEY)) < 5, "50 random characters"),
):
    if ASSISTANT_HTTPS and _careless:
        raise ImproperlyConfigured(
            f"ASSISTANT_HTTPS is on, so this is production, where {_name} must be {_wanted}."
        )
if ASSISTANT_TRUSTED_PROXIES:
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
SECURE_SSL_REDIRECT = ASSISTANT_HTTPS
# Probes speak plain HTTP inside the network.
SECURE_REDIRECT_EXEMPT = [r"^(livez|readyz|healthz|health|metrics)$"]
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = ASSISTANT_HTTPS
SECURE_HSTS_SECONDS = 31_536_000 if ASSISTANT_HTTPS else 0
SECURE_HSTS_INCLUDE_SUBDOMAINS = SECURE_HSTS_PRELOAD = ASSISTANT_HTTPS
CSRF_FAILURE_VIEW = "conversations.views.csrf_failure"
SESSION_COOKIE_SAMESITE = CSRF_COOKIE_SAMESITE = "Lax"
X_FRAME_OPTIONS = "SAMEORIGIN"  # the chat may be framed by the product itself, hence not W019
SILENCED_SYSTEM_CHECKS = ["security.W019"]
SECURE_CROSS_ORIGIN_OPENER_POLICY = "same-origin"
SECURE_REFERRER_POLICY = "same-origin"

CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": ["'self'"],
        "script-src": ["'self'", "'wasm-unsafe-eval'"],
        "worker-src": ["'self'"],
        "connect-src": ["'self'"],
        "object-src": ["'none'"],
        "base-uri": ["'none'"],
        "form-action": ["'self'"],
        "frame-ancestors": ["'self'"],
    }
}

# --- The application -----------------------------------------------------------------------------

INSTALLED_APPS = [
    "daphne",  # before staticfiles (its check E001): gives runserver ASGI
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "servestatic",
    "django.contrib.staticfiles",
    "channels",
    "rest_framework",
    "knox",
    "drf_standardized_errors",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "csp",
    "axes",
    "django_ratelimit",  # only for its checks of the cache
    "django_structlog",
    "monitoring",
    "conversations",
    "fallback",
    "assistant",
]
MIDDLEWARE = [
    "conversations.access.request_id_middleware",
    "monitoring.views.http_metrics_middleware",
    "monitoring.request_log.RequestLog",
    "django.middleware.security.SecurityMiddleware",
    "csp.middleware.CSPMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "config.urls"
ASGI_APPLICATION = "config.asgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
LANGUAGE_CODE = "en"
USE_TZ = True
TIME_ZONE = "UTC"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

STATIC_URL = "/static/"
STATIC_ROOT = BASE_DIR / "staticfiles"
# Found in the apps themselves, so that a clone needs no collectstatic.
SERVESTATIC_USE_FINDERS = True
SERVESTATIC_ALLOW_ALL_ORIGINS = False


def static_headers(headers: Any, path: str, url: str) -> None:
    """Let isolated pages of this origin, and no other, use our files (wasm threads need it)."""
    headers["Cross-Origin-Resource-Policy"] = "same-origin"
    headers["X-Content-Type-Options"] = "nosniff"


SERVESTATIC_ADD_HEADERS_FUNCTION = static_headers

# --- Who is asking -------------------------------------------------------------------------------

AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in (
        "UserAttributeSimilarityValidator",
        "MinimumLengthValidator",
        "CommonPasswordValidator",
        "NumericPasswordValidator",
    )
]
# The first looks at no password: it refuses an address that has to wait.
AUTHENTICATION_BACKENDS = [
    "axes.backends.AxesStandaloneBackend",
    "django.contrib.auth.backends.ModelBackend",
]
LOGIN_URL = "/accounts/login/"
LOGIN_REDIRECT_URL = LOGOUT_REDIRECT_URL = "/"
# Knox itself has this default, but migrations read the setting.
KNOX_TOKEN_MODEL = "knox.AuthToken"  # noqa: S105
REST_KNOX = {
    "AUTH_HEADER_PREFIX": "Bearer",  # what OpenAI clients and curl examples send
    # Knox's ten hours suit browser logins; these keys sit in other servers' settings.
    "TOKEN_TTL": timedelta(
        days=env_whole("ASSISTANT_TOKEN_DAYS", 365, "Life of an API token, in days.", least=1)
    ),
}
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "conversations.access.TokenAuthentication",  # first: its challenge is the 401's header
        "conversations.access.VisitorAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": [
        "conversations.access.HasCaller",
        "conversations.access.HasScope",
    ],
    "DEFAULT_PARSER_CLASSES": ["conversations.access.BoundedJSONParser"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_CONTENT_NEGOTIATION_CLASS": "conversations.access.OneFormat",
    "DEFAULT_SCHEMA_CLASS": "conversations.schema.TableSchema",
    "EXCEPTION_HANDLER": "drf_standardized_errors.handler.exception_handler",
    "TEST_REQUEST_DEFAULT_FORMAT": "json",
}
SPECTACULAR_SETTINGS = {
    "TITLE": "Inhouse",
    "DESCRIPTION": "Conversations with an assistant that lives inside this product.",
    "VERSION": "1",
    "OAS_VERSION": "3.1.0",
    "SCHEMA_PATH_PREFIX": "/api/v1",
    "PREPROCESSING_HOOKS": ["conversations.schema.only_ours"],
    "POSTPROCESSING_HOOKS": [
        "drf_spectacular.hooks.postprocess_schema_enums",
        "conversations.schema.strict_bodies",
    ],
    "SERVE_INCLUDE_SCHEMA": False,
    "SWAGGER_UI_DIST": "SIDECAR",  # our own files: a page that loads from a CDN is blank offline
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    # The same set of values is one type, whatever field it is in.
    "ENUM_NAME_OVERRIDES": {
        "ErrorCode": "conversations.schema.ERROR_CODES",
        "Role": "conversations.models.Message.Role",
        "Verdict": "conversations.models.Feedback.Value",
        "FeedbackReason": "conversations.models.Feedback.Reason",
    },
}
DRF_STANDARDIZED_ERRORS = {
    "EXCEPTION_HANDLER_CLASS": "conversations.wire.ProblemHandler",
    "EXCEPTION_FORMATTER_CLASS": "conversations.wire.ProblemFormatter",
}

# --- Where it is stored --------------------------------------------------------------------------

DATABASE_URL = env_secret("DATABASE_URL", "postgres://user:password@host/name. Unset: SQLite.")
_database: dict[str, Any] = dict(
    environ.Env.db_url_config(DATABASE_URL or f"sqlite:///{_data_folder() / 'db.sqlite3'}")
)
if _database["ENGINE"].endswith("sqlite3"):
    # IMMEDIATE takes the write lock at BEGIN, so two writers queue instead of failing half-way;
    # WAL lets readers go on meanwhile; 20 s is far above any write of ours.
    # Opening the file and its PRAGMAs cost a millisecond of every turn; a thread keeps its own.
    _database["CONN_MAX_AGE"] = 60
    _database["OPTIONS"] = {
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
    }
else:
    _database["CONN_HEALTH_CHECKS"] = True  # the pool never hands out a connection that died
    _database["CONN_MAX_AGE"] = 0  # the pool keeps connections; an idle stream holds none
    _database["OPTIONS"] = {
        **_database.get("OPTIONS", {}),
        # A full pool answers "busy" after 2 s; a hung server is noticed after 3 s, a query after 5.
        "pool": {"min_size": 1, "max_size": 10, "timeout": 2},
        "connect_timeout": 3,
        "options": "-c statement_timeout=5000",
    }
DATABASES = {"default": _database}

REDIS_URL = env_secret("REDIS_URL", "redis://host:6379/0. Unset: memory of this one process.")
# Always there: what the limiter counts in while Redis is away.
_memory = {
    "BACKEND": "django.core.cache.backends.locmem.LocMemCache",
    "OPTIONS": {"MAX_ENTRIES": 100_000},  # Django's 300 would forget callers under load
}
if REDIS_URL:
    _redis = {
        "BACKEND": "django_redis.cache.RedisCache",
        "LOCATION": REDIS_URL,
        "OPTIONS": {
            # Not pickle: whoever can write to Redis must not be able to run code here.
            "SERIALIZER": "django_redis.serializers.json.JSONSerializer",
            # Redis is a helper: a hung one may cost 0.2 s a call, not redis-py's five.
            "SOCKET_CONNECT_TIMEOUT": 0.2,
            "SOCKET_TIMEOUT": 0.2,
        },
    }
    CACHES = {"default": _redis, "ratelimit": _redis, "local": {**_memory, "LOCATION": "local"}}
    CHANNEL_LAYERS = {
        "default": {
            "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
            "CONFIG": {"hosts": [REDIS_URL]},
        }
    }
else:
    CACHES = {name: {**_memory, "LOCATION": name} for name in ("default", "ratelimit", "local")}
    CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
    # Right for one process (counts were exact over 8 threads), so silenced here and only here.
    SILENCED_SYSTEM_CHECKS += ["django_ratelimit.E003", "django_ratelimit.W001"]

# --- How much one caller may ask -----------------------------------------------------------------

RATELIMIT_USE_CACHE = "ratelimit"
ASSISTANT_RATE = env_rate(
    "ASSISTANT_RATE",
    "20/m",
    "Questions per caller and period (s, m, h, d), or off; as many new conversations.",
)
# Off by default: 20 questions of at most ASSISTANT_CONTEXT_TOKENS bound a minute's tokens already.
ASSISTANT_TOKENS_PER_MINUTE = env_whole(
    "ASSISTANT_TOKENS_PER_MINUTE", 0, "Tokens one caller's answers may use a minute. 0: any."
)
ASSISTANT_TOKENS_PER_DAY = env_whole(
    "ASSISTANT_TOKENS_PER_DAY",
    0,
    "Tokens one caller's answers may use a day, read and written. 0: any.",
)
# Twenty wrong passwords in five minutes is nobody who knows theirs, even behind a shared address.
ASSISTANT_LOGIN_RATE = env_rate(
    "ASSISTANT_LOGIN_RATE", "20/5m", "Failed tries to sign in per address and period, or off."
)
AXES_ENABLED = ASSISTANT_LOGIN_RATE is not None
AXES_FAILURE_LIMIT = "conversations.signing_in.failure_limit"
AXES_COOLOFF_TIME = "conversations.signing_in.cool_off"
AXES_LOCKOUT_PARAMETERS = ["ip_address"]
AXES_CLIENT_IP_CALLABLE = "conversations.signing_in.kept_address"
# A database handler that keeps nothing of what was typed. No log of sign-ins is kept, which would
# grow for ever, and none of our lines names a user or an address.
AXES_HANDLER = "conversations.signing_in.FailedTries"
AXES_DISABLE_ACCESS_LOG, AXES_ENABLE_ACCESS_FAILURE_LOG = True, False
AXES_SENSITIVE_PARAMETERS, AXES_VERBOSE = ["username", "ip_address"], False
AXES_RESET_COOL_OFF_ON_FAILURE_DURING_LOCKOUT = False
AXES_ENABLE_ADMIN = False  # conversations.admin has a list of what there is to see
# Its middleware would put a page of its own in the place of ours: the login forms ask themselves.
SILENCED_SYSTEM_CHECKS += ["axes.W002"]
ASSISTANT_ANONYMOUS = env_flag(
    "ASSISTANT_ANONYMOUS", DEBUG, "Visitors may chat in the web page without signing in."
)
# A question of 4,000 characters is about the whole context of the bundled model.
ASSISTANT_MAX_TEXT_CHARS = env_whole(
    "ASSISTANT_MAX_TEXT_CHARS", 4_000, "Longest question, in characters.", least=1
)
ASSISTANT_MAX_TURNS_PER_CALLER = env_whole(
    "ASSISTANT_MAX_TURNS_PER_CALLER", 4, "Answers one caller may have written at once.", least=1
)
# An interpreter works on one request at a time; a database far away leaves it idle meanwhile.
ASSISTANT_REQUESTS_AT_ONCE = env_whole(
    "ASSISTANT_REQUESTS_AT_ONCE",
    3,
    "API requests a process works on at once; more with a distant database.",
    least=1,
)
# Many tabs are fine, a flood is not: an idle socket takes about 64 KiB.
ASSISTANT_MAX_SOCKETS_PER_CALLER = env_whole(
    "ASSISTANT_MAX_SOCKETS_PER_CALLER", 20, "Sockets one caller may keep open.", least=1
)
# An office behind one address is fine; it also bounds sockets that have not said whose they are.
ASSISTANT_MAX_SOCKETS_PER_ADDRESS = env_whole(
    "ASSISTANT_MAX_SOCKETS_PER_ADDRESS", 100, "Sockets one address may keep open.", least=1
)

# --- Who answers ---------------------------------------------------------------------------------

ASSISTANT_BACKEND = env_text(
    "ASSISTANT_BACKEND", "model", "Which backend writes answers: model, or echo (a fake for tests)."
)
_MODEL_DIR = env_text(
    "ASSISTANT_MODEL_DIR", "assistant/bundled/support-en", "Folder of the model that answers."
)
_MAX_NEW_TOKENS = env_whole(
    # The longest reference answers have about 250 tokens.
    "ASSISTANT_MAX_NEW_TOKENS",
    256,
    "Longest answer, in tokens.",
    least=1,
)
# A larger model elsewhere is off unless all three are set; the first two may be there for others.
_UPSTREAM = {
    "base_url": env_text(
        "OPENAI_BASE_URL", "", "Server of a larger model, such as https://api.openai.com/v1."
    ),
    "api_key": env_secret("OPENAI_API_KEY", "Key for that server."),
    "model": env_text(
        "ASSISTANT_UPSTREAM_MODEL",
        "",
        "Name of the larger model there. It is asked only if this and the two above are set.",
    ),
}
if _UPSTREAM["model"] and not all(_UPSTREAM.values()):
    raise ImproperlyConfigured(
        "ASSISTANT_UPSTREAM_MODEL is set, so OPENAI_BASE_URL and OPENAI_API_KEY must be set too. "
        "Set them, or unset the model to use none."
    )
_UPSTREAM_SYSTEM = (
    "You are the customer support assistant of an online shop. Answer briefly, in plain text and "
    "in the user's language. Words in double braces such as {{Order Number}} stand for values you "
    "cannot see: copy them exactly, braces included, and never invent a value. If you do not know "
    "something about the shop, say so."
)
# An answer depends on the model and on what is in the key, not on the day; an hour bounds how long
# a fact that changed elsewhere is told the old way.
_CACHE_FRESH_S = env_seconds(
    "ASSISTANT_CACHE_FRESH_S",
    3600,
    "How long an answer is given again instead of written. 0: every one is written anew.",
)
ASSISTANT: dict[str, Any] = {
    "BACKENDS": {
        "model": {
            "BACKEND": "assistant.backends.versioned.VersionedBackend",
            "OPTIONS": {
                "model_dir": str(BASE_DIR / Path(_MODEL_DIR).expanduser()),
                "threads": env_whole(
                    "ASSISTANT_THREADS",
                    0,
                    "Threads of the engine; 0: all cores, but one for models of 16 MiB or less.",
                ),
                "max_batch": env_whole(
                    "ASSISTANT_MAX_BATCH", 32, "Answers written at the same time.", least=1
                ),
                # At four full batches the last in the queue waits several seconds; beyond that a
                # rule's answer now is better than a model's answer later.
                "max_queue": env_whole(
                    "ASSISTANT_MAX_QUEUE",
                    128,
                    "Questions waiting before new ones are refused.",
                    least=1,
                ),
                "context_tokens": env_whole(
                    "ASSISTANT_CONTEXT_TOKENS",
                    1024,
                    "History, question and answer, in tokens.",
                    least=64,
                ),
                "kv_mb": env_whole(
                    "ASSISTANT_KV_MB",
                    0,
                    "Memory of running answers, in MiB; it may lower the number of answers written "
                    "at the same time. 0: a quarter of the machine's or container's.",
                ),
                "prefix_mb": env_whole(
                    "ASSISTANT_PREFIX_MB",
                    64,
                    "Memory of finished answers, in MiB, kept so that a chat's next turn reads "
                    "only what is new. 0: none.",
                ),
                # A reader gains nothing from 300 tokens a second; many readers gain from sharing.
                "reading_tokens_per_s": env_whole(
                    "ASSISTANT_READING_TOKENS_PER_S",
                    0,
                    "Pace of an answer after its first words, for very many readers at once, such "
                    "as 8. 0: as fast as possible.",
                ),
            },
        },
        "echo": {"BACKEND": "assistant.backends.echo.EchoBackend", "OPTIONS": {}},
        **(
            {
                "upstream": {
                    "BACKEND": "fallback.upstream.UpstreamBackend",
                    "OPTIONS": {
                        **_UPSTREAM,
                        "system": _UPSTREAM_SYSTEM,
                        "max_new_tokens": _MAX_NEW_TOKENS,
                    },
                }
            }
            if all(_UPSTREAM.values())
            else {}
        ),
    },
    "UPSTREAM": {
        # Enough to see what it is worth, too little to be a surprise on a bill.
        "CALLS_PER_DAY": env_whole(
            "ASSISTANT_UPSTREAM_CALLS_PER_DAY", 500, "Calls of the larger model a day, by all."
        ),
        "CALLS_PER_USER_DAY": env_whole(
            "ASSISTANT_UPSTREAM_CALLS_PER_USER",
            20,
            "Calls of the larger model a day, by one user.",
        ),
        "CONSENT": env_text(
            "ASSISTANT_UPSTREAM_CONSENT",
            "all",
            "Whose questions may go there, without personal values: all, signed_in, none, or the "
            "dotted path of a function of the caller's key.",
        ),
    },
    # When a backend is left alone for a while; see fallback/breaker.py for what each means.
    "BREAKER": {"shared": ["upstream"]},
    # Tried in order until one answers; every name that is not one of ours is a backend's alias.
    "ROUTE": [
        "reviewed",
        *(["cache"] if _CACHE_FRESH_S else []),
        ASSISTANT_BACKEND,
        *(["upstream"] if all(_UPSTREAM.values()) else []),
        *("stale", "rules", "human"),
    ],
    # Above 0, a model that is less sure than this hands on, whatever its own fitted bands say.
    "CONFIDENCE_MIN": env_share(
        "ASSISTANT_CONFIDENCE_MIN", 0.0, "How sure (0 to 1) a model must be. 0: as it was fitted."
    ),
    "MAX_NEW_TOKENS": _MAX_NEW_TOKENS,
    # How sure (0..100) a rule must be to speak. At 70, 96 % of what rules say to natural questions
    # of a shop is right and they answer 85 % of them; at 60 it is 95 and 88, at 80 97 and 81.
    "RULE_SCORE": 70.0,
    # A reviewed answer to other words (fallback/near.py). The words decide; the model may refuse:
    # of pairs with the same words 1 % lie under 0.5, of pairs about something else 99 % do.
    "NEAR": {"SIMILARITY": 0.5, "MARGIN": 0.02, "READ_TIMEOUT_S": 0.25},
    "CACHE": {
        "FRESH_S": _CACHE_FRESH_S,
        "STALE_S": env_seconds(
            "ASSISTANT_CACHE_STALE_S",
            86400,
            "How long after it was written an answer may still stand in for a model that fails.",
        ),
        # As long as for a model's first word: after that everybody makes an answer of their own.
        "WAIT_S": 5.0,
    },
    "FIRST_TOKEN_TIMEOUT_S": env_seconds(
        "ASSISTANT_FIRST_TOKEN_TIMEOUT_S", 5, "Wait for the model's first word before rules answer."
    ),
    "REQUEST_TIMEOUT_S": env_seconds(
        "ASSISTANT_REQUEST_TIMEOUT_S",
        60,
        "Longest time of one answer; what is known ends it.",
    ),
    # Long enough for a page reload to attach again, short enough to free the slot within 500 ms.
    "ABANDON_GRACE_S": env_seconds(
        "ASSISTANT_ABANDON_GRACE_S", 0.25, "How long an answer nobody reads is still written."
    ),
    "NAME": env_text("ASSISTANT_NAME", "Support assistant", "The assistant's name on the page."),
    # Names as the model writes them; an empty value becomes a plain wording in the answer.
    "FACTS": {
        "Company": env_text("ASSISTANT_SUPPORT_COMPANY", "", "Your company's name."),
        "Website": env_text("ASSISTANT_SUPPORT_WEBSITE", "", "Your website's address."),
        "Support Phone": env_text(
            "ASSISTANT_SUPPORT_PHONE", "", "Telephone number of your support."
        ),
        "Support Email": env_text("ASSISTANT_SUPPORT_EMAIL", "", "E-mail address of your support."),
        "Support Hours": env_text(
            "ASSISTANT_SUPPORT_HOURS", "", "When your support can be reached."
        ),
        "Live Chat": env_text("ASSISTANT_SUPPORT_LIVE_CHAT", "", "Where your live chat is."),
    },
    # Dotted paths of functions (user) -> {"Order Number": ...}: what your product knows of a user.
    "FACT_FUNCTIONS": [],
    # Whoever means this is answered, and a person is asked as well.
    "HAND_OVER_INTENTS": ["contact_human_agent"],
    # What a candidate may lose on the golden set against the active model (monitoring/loop.py).
    "GOLDEN_GATE": {
        # In points of a hundred: about one of the golden set's 250 questions with an intent.
        "INTENT_POINTS": 0.5,
        "ANSWER_POINTS": 0.5,  # sound placeholders, well ended answers
        # Of a kind (single, several turns, out of scope, rude, injection): a mean can hide a hole.
        "KIND_POINTS": 3.0,
        # One of a kind's 12 cases is 8 points: so many cases may go either way by chance.
        "KIND_CASES": 1,
    },
    "RETRAIN": {
        # Who writes most must not decide what the model learns; one correction each is always used.
        "MOST_OF_ONE_USER": 0.01,
        # Corrections are learned in minutes; what takes an hour hangs.
        "MOST_S": 3600.0,
    },
    # A candidate beside the live model, and what lets it on (monitoring/shadow.py).
    "SHADOW": {
        "SHARE": env_share(
            "ASSISTANT_SHADOW_SHARE",
            0.1,
            "Share (0 to 1) of the model's answers that a candidate in shadow writes too.",
        ),
        "PAIRS": env_whole(
            "ASSISTANT_SHADOW_PAIRS",
            200,
            "Pairs of answers before a candidate in shadow is judged.",
            least=20,
        ),
        "QUEUE": 32,
        "THREADS": 1,
        # How alike two texts of one meaning are, at least: of the bundled model's answers under
        # one intent 77 % of pairs are, under two intents 15 %.
        "SIMILARITY": 0.25,
        "AGREEMENT_MIN": 0.6,
        "SLOWER_MAX": 1.5,
        "FAILED_MAX": 0.01,
        # Verdicts of staff that let a candidate on which agrees less than that.
        "JUDGED": 20,
    },
    # A candidate that answers some conversations, and what lets it on (monitoring/canary.py).
    "CANARY": {
        # At a tenth, what fails four times as often is found within 1,500 conversations.
        "PERCENT": env_whole(
            "ASSISTANT_CANARY_PERCENT",
            10,
            "Share of conversations, in percent (1 to 100), that a canary answers.",
            least=1,
        ),
        "CONVERSATIONS": env_whole(
            "ASSISTANT_CANARY_CONVERSATIONS",
            200,
            "Conversations a canary answers before it may become the active model.",
            least=20,
        ),
    },
    "EXAMPLES": [
        "How do I cancel my order?",
        "Where is my refund?",
        "I forgot my password",
        "Can I speak to a person?",
    ],
}

# --- Asking for a person ------------------------------------------------------------------------

ASSISTANT_HAND_OVER = env_flag(
    "ASSISTANT_HAND_OVER", True, "Staff see in the admin who asked for a person, and answer there."
)
ASSISTANT_HAND_OVER_WEBHOOK = env_text(
    "ASSISTANT_HAND_OVER_WEBHOOK", "", "Address that gets a signed POST for each hand-over."
)
ASSISTANT_HAND_OVER_WEBHOOK_SECRET = env_secret(
    "ASSISTANT_HAND_OVER_WEBHOOK_SECRET", "Signs that POST; at least 16 characters."
)
if ASSISTANT_HAND_OVER_WEBHOOK:
    if not re.fullmatch(r"https?://[^\s/@]+(/\S*)?", ASSISTANT_HAND_OVER_WEBHOOK):
        raise _bad(
            "ASSISTANT_HAND_OVER_WEBHOOK",
            ASSISTANT_HAND_OVER_WEBHOOK,
            "an address such as https://desk.example.com/hook",
        )
    if len(ASSISTANT_HAND_OVER_WEBHOOK_SECRET) < 16:
        raise ImproperlyConfigured(
            "ASSISTANT_HAND_OVER_WEBHOOK is set, so ASSISTANT_HAND_OVER_WEBHOOK_SECRET must have "
            "at least 16 characters. Make one with: python -c 'import secrets; "
            "print(secrets.token_urlsafe(24))'"
        )
ASSISTANT_HAND_OVER_EMAIL = env_list(
    "ASSISTANT_HAND_OVER_EMAIL", "", "Addresses that get a mail for each hand-over."
)
for _address in ASSISTANT_HAND_OVER_EMAIL:
    if not re.fullmatch(r"[^\s@]+@[^\s@]+", _address):
        raise _bad("ASSISTANT_HAND_OVER_EMAIL", _address, "an address such as desk@example.com")
# A mail every five minutes is read; a hundred an hour are filtered away.
ASSISTANT_HAND_OVER_MAILS_PER_HOUR = env_whole(
    "ASSISTANT_HAND_OVER_MAILS_PER_HOUR",
    12,
    "Mails about hand-overs an address gets in an hour; the rest are told of together.",
    least=1,
)
# What users write stays in the house unless somebody decides otherwise.
ASSISTANT_HAND_OVER_TEXT = env_flag(
    "ASSISTANT_HAND_OVER_TEXT",
    False,
    "Webhook and mail tell the question, without personal values.",
)
_EMAIL_URL = env_secret(
    "EMAIL_URL", "Mail server, such as smtp+tls://user:password@host:587. Unset: localhost."
)
if _EMAIL_URL:
    globals().update(environ.Env.email_url_config(_EMAIL_URL))
DEFAULT_FROM_EMAIL = env_text(
    "DEFAULT_FROM_EMAIL", "assistant@localhost", "Sender of the product's mails."
)
EMAIL_TIMEOUT = 10

# --- Background work -----------------------------------------------------------------------------

CELERY_BROKER_URL = env_secret(
    "CELERY_BROKER_URL",
    "Queue of background jobs. Unset: REDIS_URL, else files in the data folder.",
) or (REDIS_URL or "filesystem://")
CELERY_BROKER_TRANSPORT_OPTIONS: dict[str, Any] = {}
if CELERY_BROKER_URL == "filesystem://":
    _queue = str(_data_folder("celery", "queue"))
    CELERY_BROKER_TRANSPORT_OPTIONS = {
        "data_folder_in": _queue,
        "data_folder_out": _queue,
        "control_folder": str(_data_folder("celery", "control")),
    }
elif CELERY_BROKER_URL.startswith("redis"):
    # A page of staff that asks for a job waits so long for a Redis that hangs, three times at most.
    # More than a second: a worker listens for one at a time.
    CELERY_BROKER_TRANSPORT_OPTIONS = {"socket_timeout": 1.5, "socket_connect_timeout": 1.0}
CELERY_BEAT_SCHEDULE_FILENAME = str(DATA_DIR / "celery" / "beat")
CELERY_TASK_SERIALIZER = CELERY_RESULT_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_TASK_IGNORE_RESULT = True
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True

# --- Retraining ----------------------------------------------------------------------------------

# A model that learned something wrong is told to everyone: a person looks at what it would learn.
ASSISTANT_RETRAIN_APPROVAL = env_flag(
    "ASSISTANT_RETRAIN_APPROVAL", True, "A retraining waits for a person's yes in the admin."
)
# Fewer teach little that is general, and each retraining is a risk of its own.
ASSISTANT_RETRAIN_CORRECTIONS = env_whole(
    "ASSISTANT_RETRAIN_CORRECTIONS",
    50,
    "Unused reviewed corrections that open a retraining.",
    least=1,
)

# In shadow nobody reads its answers. A canary's are read, so a person lets it begin.
ASSISTANT_PROMOTE_UP_TO = env_text(
    "ASSISTANT_PROMOTE_UP_TO",
    "shadow",
    "How far gates take a retrained model without a person: candidate, shadow, canary or active.",
)
if ASSISTANT_PROMOTE_UP_TO not in {"candidate", "shadow", "canary", "active"}:
    raise _bad(
        "ASSISTANT_PROMOTE_UP_TO", ASSISTANT_PROMOTE_UP_TO, "candidate, shadow, canary or active"
    )

# --- Who may watch -------------------------------------------------------------------------------

ASSISTANT_METRICS_TOKEN = env_secret(
    "ASSISTANT_METRICS_TOKEN",
    "Opens /metrics and the reasons at /readyz, sent as a bearer; staff see them signed in.",
)
if 0 < len(ASSISTANT_METRICS_TOKEN) < 16:
    raise ImproperlyConfigured(
        "ASSISTANT_METRICS_TOKEN is shorter than 16 characters, so it could be guessed. Make one "
        "with: python -c 'import secrets; print(secrets.token_urlsafe(24))'"
    )
# None by default: behind a proxy on this host everybody would come from 127.0.0.1.
ASSISTANT_INTERNAL_NETWORKS = env_networks(
    "ASSISTANT_INTERNAL_NETWORKS", "Networks that see the same, such as 10.0.0.0/8,fd00::/8."
)
# Only for several processes behind one address; its folder must be empty when they start.
PROMETHEUS_MULTIPROC_DIR = env_text(
    "PROMETHEUS_MULTIPROC_DIR",
    "",
    "Folder in which several processes add up their metrics. Unset: each shows its own.",
)
if PROMETHEUS_MULTIPROC_DIR:
    _made(Path(PROMETHEUS_MULTIPROC_DIR), "PROMETHEUS_MULTIPROC_DIR")
# Longer than a balancer takes to notice; the server's own --timeout-graceful-shutdown follows.
ASSISTANT_DRAIN_SECONDS = env_seconds(
    "ASSISTANT_DRAIN_SECONDS",
    0,
    "Seconds between SIGTERM, which turns /readyz to 503, and the end.",
)

# --- What is written down ------------------------------------------------------------------------

LOG_LEVEL = env_text("ASSISTANT_LOG_LEVEL", "INFO", "Least level that is logged.").upper()
ASSISTANT_LOG_FORMAT = env_text(
    "ASSISTANT_LOG_FORMAT", "plain", "plain for people, or json: one object a line for machines."
)
if ASSISTANT_LOG_FORMAT not in {"plain", "json"}:
    raise _bad("ASSISTANT_LOG_FORMAT", ASSISTANT_LOG_FORMAT, "plain or json")
ASSISTANT_LOG_CONTENT = env_flag(
    "ASSISTANT_LOG_CONTENT",
    False,
    "Log what was asked and answered too, personal values masked.",
)


def callers_mistake(record: logging.LogRecord) -> bool:
    """A request Django itself refused is one line, without our stack and their header."""
    if record.name.startswith("django.security."):
        record.msg, record.args = "A request was refused as malformed.", None
        record.exc_info = record.exc_text = None
    return True


def redis_away(record: logging.LogRecord) -> bool:
    """While Redis is away, the layer of channels says so every second, each time with its stack."""
    if record.name.startswith("channels_redis"):
        record.exc_info = record.exc_text = None
    return True


LOGGING = {
    "version": 1,
    "filters": {
        "mistakes": {"()": "django.utils.log.CallbackFilter", "callback": callers_mistake},
        "away": {"()": "django.utils.log.CallbackFilter", "callback": redis_away},
    },
    "disable_existing_loggers": False,
    "formatters": {
        "plain": {"()": "monitoring.logs.plain_formatter"},
        "json": {"()": "monitoring.logs.json_formatter"},
    },
    "handlers": {
        "stderr": {
            "class": "logging.StreamHandler",
            "formatter": ASSISTANT_LOG_FORMAT,
            "filters": ["mistakes", "away"],
        }
    },
    "root": {"handlers": ["stderr"], "level": LOG_LEVEL},
}
# An address is more than a line needs. A task's lines hold the id of the request that asked for it.
DJANGO_STRUCTLOG_IP_LOGGING_ENABLED = False
DJANGO_STRUCTLOG_CELERY_ENABLED = True
if ASSISTANT_LOG_FORMAT == "json":
    # uvicorn has handlers of its own, for people; its line of each request is one of ours instead.
    LOGGING["loggers"] = {
        "uvicorn": {"handlers": [], "propagate": True},
        "uvicorn.access": {"handlers": [], "propagate": True, "level": "WARNING"},
        "monitoring": {"level": "INFO"},
        "axes": {"level": "WARNING"},  # else four lines for each sign-in
        "httpx2": {"level": "WARNING"},  # else each address asked, and some hold keys
    }
else:
    LOGGING["loggers"] = {
        "monitoring.logs": {"level": "CRITICAL"},  # figures are for machines
        "django_structlog": {"level": "CRITICAL"},  # and so is a line for each request
        "axes": {"level": "WARNING"},
        "httpx2": {"level": "WARNING"},
    }
# The extra `observability` sends them; standard names, so that an agent's settings fit.
OTEL_EXPORTER_OTLP_ENDPOINT = env_text(
    "OTEL_EXPORTER_OTLP_ENDPOINT", "", "Collector that gets a trace of each answer, over HTTP."
)
if OTEL_EXPORTER_OTLP_ENDPOINT and not re.fullmatch(
    r"https?://[^\s/@]+(/\S*)?", OTEL_EXPORTER_OTLP_ENDPOINT
):
    raise _bad(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        OTEL_EXPORTER_OTLP_ENDPOINT,
        "an address such as http://127.0.0.1:4318",
    )
OTEL_SERVICE_NAME = env_text("OTEL_SERVICE_NAME", "inhouse", "What traces call this product.")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # serving never downloads
