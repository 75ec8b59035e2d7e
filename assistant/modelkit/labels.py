"""The closed sets a model of ours speaks: control pieces, intents, placeholders.

The order is the order of token ids, so it only ever grows at the end of each list.
"""

from __future__ import annotations

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
IN_SCOPE, OUT_SCOPE = "<|in_scope|>", "<|out_scope|>"
CONTROLS = (PAD, END, SYSTEM, USER, ASSISTANT, IN_SCOPE, OUT_SCOPE)

SUPPORT = (
    "cancel_order",
    "change_order",
    "change_shipping_address",
    "check_cancellation_fee",
    "check_invoice",
    "check_payment_methods",
    "check_refund_policy",
    "complaint",
    "contact_customer_service",
    "contact_human_agent",
    "create_account",
    "delete_account",
    "delivery_options",
    "delivery_period",
    "edit_account",
    "get_invoice",
    "get_refund",
    "newsletter_subscription",
    "payment_issue",
    "place_order",
    "recover_password",
    "registration_problems",
    "review",
    "set_up_shipping_address",
    "switch_account",
    "track_order",
    "track_refund",
)
SMALL_TALK = (
    "greeting",
    "thanks",
    "goodbye",
    "bot_identity",
    "capabilities",
    "how_are_you",
    "affirm",
    "deny",
    "frustration",
)
OUT_OF_SCOPE = "out_of_scope"
INTENTS = (*SUPPORT, *SMALL_TALK, OUT_OF_SCOPE)
#: Values that only the user can have given; an answer that shows one unasked has invented it.
USER_SLOTS = frozenset({"Order Number", "Invoice Number", "Amount", "Date", "Email", "Phone"})
PLACEHOLDERS = (
    "Order Number",
    "Invoice Number",
    "Amount",
    "Date",
    "Email",
    "Phone",
    "Client Name",
    "Company",
    "Website",
    "Support Email",
    "Support Phone",
    "Support Hours",
    "Live Chat",
)


def intent_token(name: str) -> str:
    return f"<|intent:{name}|>"


def placeholder_token(name: str) -> str:
    return "{{" + name + "}}"


def special_tokens() -> list[str]:
    """Every token that text can never produce, in id order from 0."""
    return [
        *CONTROLS,
        *(intent_token(name) for name in INTENTS),
        *(placeholder_token(name) for name in PLACEHOLDERS),
    ]
