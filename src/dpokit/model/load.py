"""Tokenizer, policy and reference from a name or a folder."""

from typing import Any

from peft import PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config, get_quantization_config

from dpokit.errors import ModelError, SettingsError
from dpokit.settings import Settings


def load_tokenizer(model: ModelConfig, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer; EOS pads where it has no padding token of its own.

    Raises: ModelError where there is none. That it has an EOS is checked where answers are rendered.
    """
    tokenizer: PreTrainedTokenizerBase = _load(
        AutoTokenizer, model, revision=model.model_revision, trust_remote_code=trust_remote_code
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # The model's own limit is checked by `find_max_length`; the tokenizer's would warn about prompts yet to be cut.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def load_policy(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model to train, in `--dtype`, quantised where asked for. Raises: ModelError where it cannot be loaded."""
    policy = _load_causal_lm(settings)
    rows = policy.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer):,} tokens, the model's embedding {rows:,} rows",
            expected="a tokenizer that belongs to the model",
            do="use the tokenizer that the model was saved with",
        )
    return policy


def load_reference(settings: Settings) -> PreTrainedModel | None:
    """The same weights once more, frozen; None where none is kept in memory.

    With an adapter, the policy with the adapter switched off is the reference; with precomputed log-probs TRL asks the
    untrained policy before the first step.
    """
    if settings.model.use_peft or settings.training.precompute_ref_log_probs:
        return None
    return _load_causal_lm(settings).requires_grad_(False)


def build_peft_config(settings: Settings) -> PeftConfig | None:
    """LoRA by TRL's flags, or None. Raises: SettingsError where LoRA flags are set but `use_peft` is not."""
    if not settings.model.use_peft:
        asked = [name for name in settings.origins if name.startswith("lora_") or name in ("use_dora", "use_rslora")]
        if any(settings.origins[name] == "command line" for name in asked):
            raise SettingsError(
                f"{', '.join(asked)} is set, but use_peft is not: the whole model would be trained",
                expected="--use_peft with LoRA's settings",
                do="add --use_peft, or remove the LoRA settings",
            )
        if settings.model.load_in_4bit or settings.model.load_in_8bit:
            raise SettingsError(
                "a quantised model cannot be trained as a whole",
                expected="--use_peft with --load_in_4bit or --load_in_8bit",
                do="add --use_peft, or load the model in 16 or 32 bit",
            )
    config: PeftConfig | None = get_peft_config(settings.model)
    return config


def find_max_length(settings: Settings, policy: PreTrainedModel) -> int | None:
    """Most tokens a pair may have: `--max_length`, else TRL's default or the model's positions, whichever is less.

    Raises: SettingsError where more is asked for than the model has positions.
    """
    positions: int | None = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    asked = settings.training.max_length
    if asked is None or positions is None:
        return asked or positions
    if asked > positions and "max_length" in settings.origins:
        raise SettingsError(
            f"max_length is {asked}, but the model has only {positions} positions",
            expected=f"at most {positions}",
            do=f"--max_length {positions}",
        )
    return min(asked, positions)


def _load_causal_lm(settings: Settings) -> PreTrainedModel:
    model = settings.model
    policy: PreTrainedModel = _load(
        AutoModelForCausalLM,
        model,
        revision=model.model_revision,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        trust_remote_code=settings.training.trust_remote_code,
        quantization_config=get_quantization_config(model),
    )
    return policy


def _load(kind: Any, model: ModelConfig, **options: Any) -> Any:
    name = model.model_name_or_path
    if not name:
        raise ModelError("no model was named", expected="a Hub id or a folder", do="--model_name_or_path ID|FOLDER")
    what = "tokenizer" if kind is AutoTokenizer else "model"
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"--model_name_or_path {name}: no {what} could be loaded: {' '.join(str(error).split())[:300]}",
            expected="a Hub id that this machine can reach, or a folder with config.json, weights and tokenizer",
            do="check the name; for a gated model log in with `hf auth login`; without a network give a folder",
        ) from error
