"""Which tables of `published/` were collected when, and when their rows were first looked at beside predictions."""

from __future__ import annotations

HALF_A = (
    "bloom_topologies",
    "ibm_fms_fsdp",
    "maxtext_tpu",
    "megatron_bridge_hopper",
    "modalities_fsdp",
    "nemo_long_context",
    "tpu_recipes_v6e",
)
"""Tables whose single rows were looked at before the planner was changed: every second one in alphabetical order."""

LATER = ("tpu_recipes_ironwood",)
"""Tables collected after the planner was changed."""

BLIND = (
    "ascend_modellink",
    "deepspeed_posts",
    "dgxc_gb200",
    "dgxc_h100",
    "dgxc_moe",
    "dtfm_v100",
    "flagperf_megatron",
    "flagperf_paddle",
    "gpt2_xl_fsdp",
    "jax_toolbox_pax",
    "kwai_atc24",
    "lucie_a100",
    "lumi_mi250x",
    "megatron_moe_zoo",
    "ms_swift",
    "nanotron_old_bench",
    "nemo_a100",
    "nemo_automodel",
    "neuron_trn1",
    "nvidia_bert",
    "oneflow_bert_v100",
    "oneflow_gpt_v100",
    "paddlenlp_a100",
    "primus_mi355x",
    "vit",
    "xtuner_long_a100",
    "xtuner_moe_h800",
    "zero_7b_a800",
)
"""Tables collected after that without running the planner on them; their first figures are those of commit 3878c1f."""

OPENED = (
    "deepspeed_posts",
    "dgxc_h100",
    "dtfm_v100",
    "flagperf_paddle",
    "jax_toolbox_pax",
    "lucie_a100",
    "megatron_moe_zoo",
    "nanotron_old_bench",
    "nemo_automodel",
    "nvidia_bert",
    "oneflow_gpt_v100",
    "primus_mi355x",
    "xtuner_long_a100",
    "zero_7b_a800",
)
"""The half of them whose rows were looked at first; those of the others after the figures of `LAST_BLIND_FILE` were taken."""

SEALED = (
    "aleph_13b",
    "aleph_13b_8k",
    "aleph_30b",
    "aleph_30b_8k",
    "aleph_65b",
    "aleph_sequence",
    "alpa_2d_v100",
    "alpa_v100",
    "amp_t4",
    "bigscience_1b3_v100",
    "bmtrain_v100",
    "esm2_a10g",
    "flagperf_small_a100",
    "fms_acceleration_a100",
    "google_gpu_recipes",
    "jean_zay_qwen_sft",
    "lightning_gpt_v100",
    "megatron_bridge_notes",
    "megatron_deepspeed_long",
    "megatron_tests",
    "megatron_tests_tiny",
    "mlperf_gpt3",
    "mlperf_llama405b",
    "mlperf_llama8b",
    "nvidia_bert_tf2",
    "torchao_float8",
    "vectorlm_a100",
    "vocabulary_pp8_a100",
    "yafsdp_a100",
)
"""Set E: collected after D was opened, by quality of statement alone and without running the planner on a row."""
