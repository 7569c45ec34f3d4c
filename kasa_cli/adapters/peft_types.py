"""PEFT's types of adapters that can be merged: a row each, with the fields of its config and its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

from kasa_cli.adapters.config_fields import (
    ALPHAS,
    ANY,
    BIAS,
    COUNT,
    FLAG,
    INDICES,
    KASA,
    LABEL,
    LAYERS,
    LIST,
    NAMES,
    NUMBER,
    RANKS,
    SAVED,
    VERSION,
    Field,
    map_of,
    one_of,
    rows,
    unset,
)

COMMON = {
    **rows(ANY, "task_type auto_mapping inference_mode layers_pattern init_weights"),
    **rows(LABEL, "peft_type base_model_name_or_path revision"),
    **rows(NAMES, "target_modules exclude_modules modules_to_save"),
    "layers_to_transform": LAYERS,
    "peft_version": VERSION,
}

LORA = {
    **COMMON,
    **rows(COUNT, "r"),
    **rows(NUMBER, "lora_alpha"),
    **rows(ANY, "lora_dropout megatron_core qalora_group_size runtime_config loftq_config eva_config"),
    **rows(ANY, "corda_config lora_ga_config init_lora_weights"),
    **rows(FLAG, "fan_in_fan_out use_rslora use_dora lora_bias ensure_weight_tying"),
    "bias": BIAS,
    "rank_pattern": RANKS,
    "alpha_pattern": ALPHAS,
    "trainable_token_indices": INDICES,
    "target_parameters": LIST,
    "kasa_config": KASA,
    "alora_invocation_tokens": unset("aLoRA depends on the input"),
    "arrow_config": unset("Arrow depends on the input"),
    "use_qalora": unset("QALoRA belongs to a quantized base"),
    "layer_replication": unset("it copies layers of the base"),
    "megatron_config": unset("Megatron has other names"),
    "use_bdlora": unset("BD-LoRA is block-diagonal"),
    "velora_config": unset("VeLoRA is not read"),
    "monteclora_config": unset("MonteCLoRA is not read"),
}

LYCORIS = {
    **COMMON,
    **rows(COUNT, "r"),
    **rows(NUMBER, "alpha"),
    **rows(ANY, "rank_dropout module_dropout use_effective_conv2d decompose_both decompose_factor"),
    **rows(ANY, "rank_dropout_scale"),
    "rank_pattern": RANKS,
    "alpha_pattern": ALPHAS,
}


@dataclass(frozen=True)
class Method:
    """One of PEFT's types: its fields, and the sets of tensors of which a module has exactly one.

    `rank` and `alpha` name the fields; `keeps` what is handed on as it is. `shared` tensors serve all modules.
    """

    kind: str
    fields: Mapping[str, Field]
    groups: tuple[tuple[str, ...], ...]
    keeps: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("r",)
    alpha: str = ""
    shared: tuple[str, ...] = ()


def groups(*lines: str) -> tuple[tuple[str, ...], ...]:
    """Sets of tensor names, each a line of words."""
    return tuple(tuple(line.split()) for line in lines)


METHODS: Mapping[str, Method] = {
    "LORA": Method(
        "lora",
        LORA,
        groups("lora_A lora_B", "lora_embedding_A lora_embedding_B"),
        ("use_rslora", "fan_in_fan_out", "lora_bias"),
        needs=("r", "lora_alpha"),
        alpha="lora_alpha",
    ),
    "ADALORA": Method(
        "adalora",
        {
            **LORA,
            **rows(ANY, "target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step"),
            "init_r": COUNT,
            "rank_pattern": Field(map_of(lambda v: isinstance(v, list)), "must map tensors to lists"),
            **rows(unset("PEFT has none for AdaLoRA"), "use_dora lora_bias target_parameters kasa_config"),
        },
        groups("lora_A lora_B lora_E"),
        ("fan_in_fan_out",),
        needs=("init_r", "lora_alpha"),
        alpha="lora_alpha",
    ),
    "IA3": Method(
        "ia3",
        {**COMMON, "fan_in_fan_out": FLAG, "feedforward_modules": NAMES, "init_ia3_weights": ANY},
        groups("ia3_l"),
        ("fan_in_fan_out",),
        needs=(),
    ),
    "HRA": Method(
        "hra", {**COMMON, "r": COUNT, "bias": BIAS, "apply_GS": FLAG}, groups("hra_u"), ("apply_GS",)
    ),
    "DELORA": Method(
        "delora",
        {
            **COMMON,
            **rows(ANY, "delora_lambda module_dropout lambda_pattern"),
            "r": COUNT,
            "bias": BIAS,
            "rank_pattern": RANKS,
        },
        groups("delora_A delora_B delora_lambda delora_w_norm"),
    ),
    "LOHA": Method(
        "loha",
        LYCORIS,
        groups("hada_w1_a hada_w1_b hada_w2_a hada_w2_b"),
        needs=("r", "alpha"),
        alpha="alpha",
    ),
    "LOKR": Method(
        "lokr",
        LYCORIS,
        groups(
            "lokr_w1 lokr_w2",
            "lokr_w1 lokr_w2_a lokr_w2_b",
            "lokr_w1_a lokr_w1_b lokr_w2",
            "lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b",
        ),
        needs=("r", "alpha"),
        alpha="alpha",
    ),
    "OFT": Method(
        "oft",
        {
            **COMMON,
            **rows(FLAG, "fan_in_fan_out coft block_share use_cayley_neumann"),
            **rows(NUMBER, "r eps num_cayley_neumann_terms oft_block_size"),
            "module_dropout": ANY,
            "bias": BIAS,
        },
        groups("oft_R.weight", "oft_embedding_R.weight"),
        ("fan_in_fan_out", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"),
        needs=("oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms"),
    ),
    "VERA": Method(
        "vera",
        {
            **COMMON,
            **rows(ANY, "projection_prng_key vera_dropout d_initial"),
            "r": COUNT,
            "bias": BIAS,
            "fan_in_fan_out": FLAG,
            "save_projection": SAVED,
        },
        groups("vera_lambda_b vera_lambda_d"),
        ("fan_in_fan_out",),
        shared=("vera_A", "vera_B"),
    ),
    "RANDLORA": Method(
        "randlora",
        {
            **COMMON,
            **rows(ANY, "projection_prng_key randlora_dropout sparse very_sparse"),
            "r": COUNT,
            "randlora_alpha": NUMBER,
            "bias": BIAS,
            "fan_in_fan_out": FLAG,
            "save_projection": SAVED,
        },
        groups("randlora_lambda randlora_gamma randlora_A randlora_B", "randlora_lambda randlora_gamma"),
        ("fan_in_fan_out",),
        needs=("r", "randlora_alpha"),
        alpha="randlora_alpha",
        shared=("randlora_A", "randlora_B"),
    ),
    "HIRA": Method(
        "hira",
        {**COMMON, "r": COUNT, "hira_dropout": ANY, "fan_in_fan_out": FLAG, "rank_pattern": RANKS},
        groups("hira_A hira_B", "hira_embedding_A hira_embedding_B"),
        ("fan_in_fan_out",),
    ),
    "MISS": Method(
        "miss",
        {
            **COMMON,
            **rows(COUNT, "r mini_r"),
            "miss_dropout": ANY,
            "bias": BIAS,
            "init_weights": one_of(True, False, "bat", "mini"),
        },
        groups("miss_block"),
        ("mini_r", "init_weights"),
    ),
    "OSF": Method(
        "osf",
        {**COMMON, "effective_rank": ANY, "rank_pattern": ANY, "target_svd_config": ANY},
        groups("osf_svd_params.U_low osf_svd_params.S_low osf_svd_params.V_low"),
        needs=(),
    ),
    "ROAD": Method(
        "road",
        {**COMMON, "group_size": COUNT, "variant": one_of("road_1", "road_2", "road_4")},
        groups("road_theta road_alpha"),
        ("group_size", "variant"),
        needs=("group_size", "variant"),
    ),
    "TRAINABLE_TOKENS": Method(
        "trainable_tokens", {**COMMON, "token_indices": INDICES}, (), needs=("token_indices",)
    ),
    "LN_TUNING": Method("ln_tuning", COMMON, (), needs=()),
}
"""PEFT's types that can be merged, by `peft_type`."""

PROMPTS = frozenset(
    {
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "CPT",
        "CARTRIDGE",
        "ADAPTION_PROMPT",
    }
)
"""Types that add to the input: there is nothing to merge."""
