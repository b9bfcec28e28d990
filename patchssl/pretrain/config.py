"""The recipe of a pretraining run: frozen values, checked alone and together.

Sizes are pixels, scales are shares of the image area, times are epochs unless a name says otherwise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from patchssl.views.config import ConfigPart, MaskConfig, PhotometricConfig, Share, ViewConfig

Method = Literal["pwself", "dino", "ibot"]
Rule = Literal["center", "paper", "similarity", "random"]
Weighting = Literal["balanced", "paper", "lambda", "lambda-sum"]
CLASS_SHARE = 0.9  # as alijavidani/dino, branch QCRI_Cifar10, has it


class ModelConfig(ConfigPart):
    """The Vision Transformer: a timm name, and what of it differs from timm's default."""

    arch: str = "vit_small_patch16_224"
    patch_size: PositiveInt = 16
    embed_dim: PositiveInt | None = None
    depth: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of the student's deepest block, linear in depth


class HeadConfig(ConfigPart):
    """Projection head: an MLP to an L2-normalized bottleneck, then weight-normalized prototypes."""

    num_prototypes: Annotated[int, Field(ge=2)] = 10_000  # one alone is always certain
    hidden: PositiveInt = 2048
    bottleneck: PositiveInt = 256
    layers: PositiveInt = 3
    norm_last_layer: bool = True
    freeze_last_layer_epochs: NonNegativeFloat = 1
    shared: bool = True  # prototypes for class and patch tokens; false: patches have their own, the MLP serves both


class LossConfig(ConfigPart):
    """Temperatures, centering, and how the patch term is matched and weighted."""

    student_temp: PositiveFloat = 0.1
    teacher_temp: PositiveFloat = 0.04
    teacher_temp_start: PositiveFloat = 0.04
    teacher_temp_warmup_epochs: NonNegativeFloat = 0
    patch_teacher_temp: PositiveFloat | None = None  # of patch tokens, after the same warm-up; null: as class tokens
    centering: Literal["ema", "sinkhorn"] = "ema"
    center_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    center_per_position: bool = False  # the authors' centers: one per token position instead of one per kind
    weighting: Weighting = "balanced"  # of class token and matches, see `patchssl.pretrain.losses.pwself_loss`
    class_share: Share = CLASS_SHARE  # of the class token under lambda and lambda-sum (their authors: 0.9 and 0.8)
    patch_weight: NonNegativeFloat = 1.0
    patch_warmup_epochs: NonNegativeFloat = 0
    rule: Rule = "center"
    matches_per_pair: NonNegativeInt = 0  # so many of each pair's matches, drawn anew every time; 0: all

    @model_validator(mode="after")
    def _combinations(self) -> LossConfig:
        if self.weighting != "balanced" and (self.patch_weight != 1 or self.patch_warmup_epochs):
            weighs = "1 / (1 + matches)" if self.weighting == "paper" else f"loss.class_share = {self.class_share}"
            raise ValueError("loss.patch_weight and loss.patch_warmup_epochs belong to loss.weighting = balanced; "
                             f"with '{self.weighting}' the class token weighs {weighs}")
        if self.weighting in ("balanced", "paper") and self.class_share != CLASS_SHARE:
            raise ValueError(f"loss.class_share = {self.class_share} belongs to loss.weighting = lambda or lambda-sum, "
                             f"not to '{self.weighting}'; leave it out, or choose one of these")
        if self.center_per_position and self.centering != "ema":
            raise ValueError("loss.center_per_position = true needs loss.centering = ema")
        return self


class OptimConfig(ConfigPart):
    """AdamW and its schedules."""

    epochs: PositiveInt = 100
    batch_size: PositiveInt = 256  # images per update, all processes together
    accumulate: PositiveInt = 1  # parts that a process cuts its batch into, one after the other, for want of memory
    lr: PositiveFloat = 5e-4  # at a batch of 256, scaled linearly
    min_lr: NonNegativeFloat = 1e-6
    warmup_epochs: NonNegativeFloat = 10
    freeze_backbone_epochs: NonNegativeFloat = 1  # with init: only the fresh head learns at first
    weight_decay: NonNegativeFloat = 0.04
    weight_decay_end: NonNegativeFloat = 0.4
    clip_grad: NonNegativeFloat = 3.0  # norm per parameter tensor; 0 switches it off
    teacher_momentum: Share = 0.996
    teacher_momentum_end: Share = 1.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU


class RunConfig(ConfigPart):
    """What does not change the numbers: workers, logging, saving."""

    workers: NonNegativeInt = 2
    threads: NonNegativeInt = 0  # torch threads on a CPU; 0 leaves torch's choice
    compile: bool = False  # torch.compile of every transformer block
    shard: bool = False  # shard the weights over all processes (FSDP2) instead of keeping them whole in each
    deterministic: bool = False  # on a GPU: the same bits again, slower
    log_seconds: PositiveFloat = 5.0
    checkpoint_minutes: PositiveFloat = 10.0
    knn_every_epochs: NonNegativeInt = 0  # k-NN of training images by others, all seen in training; 0: never
    unreadable_share: Share = 0.01  # of all images may be unreadable before the run stops; they are skipped
    tensorboard: bool = False  # write the log rows as TensorBoard's event files too, in the run folder


class Recipe(ConfigPart):
    """Everything a pretraining run depends on, apart from the data's folder, the seed and the run folder."""

    method: Method = "pwself"
    init: str | None = None  # a MODEL whose backbone the student starts from, such as timm:vit_small_patch16_224.dino
    data: str | None = None  # what --data says when it is not given: a set's name such as "textures"
    max_images: PositiveInt | None = None  # train on the first so many images of a seeded shuffle
    model: ModelConfig = ModelConfig()
    views: ViewConfig = ViewConfig()
    photometric: PhotometricConfig = PhotometricConfig()
    head: HeadConfig = HeadConfig()
    loss: LossConfig = LossConfig()
    masks: MaskConfig = MaskConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _sizes_are_whole_patches(self) -> Recipe:
        for name in ("global_size", "local_size")[: 1 + (self.views.num_local > 0)]:
            if (size := getattr(self.views, name)) % self.model.patch_size:
                raise ValueError(f"views.{name} = {size} is not a multiple of "
                                 f"model.patch_size = {self.model.patch_size}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _patchwise_of_the_method(cls, values: Any) -> Any:
        """Where nothing is said of patch-wise color, baselines have none."""
        if not isinstance(values, dict) or values.get("method", "pwself") == "pwself":
            return values
        photometric = values.get("photometric") or {}
        said = photometric.model_dump(exclude_unset=True) if isinstance(photometric, BaseModel) else photometric
        if not isinstance(said, dict):
            return values  # said of the field itself
        return {**values, "photometric": {"patchwise": "none", **said}}

    @model_validator(mode="after")
    def _baselines_color_whole_views(self) -> Recipe:
        if self.method != "pwself" and self.patch_color != "none":
            raise ValueError(f"photometric.patchwise = {self.photometric.patchwise}: method {self.method} colors whole "
                             "views, set it to none (or choose method pwself; with loss.patch_weight=0 it is DINO "
                             "with patch-wise color)")
        if self.method == "ibot" and (self.loss.weighting != "balanced" or self.loss.matches_per_pair):
            raise ValueError(f"loss.weighting = {self.loss.weighting}, loss.matches_per_pair = "
                             f"{self.loss.matches_per_pair}: method ibot needs balanced and 0, for it compares masked "
                             "patches of one view, and weighs class and patch term by loss.patch_weight")
        if self.masks.matched and self.method != "pwself":
            raise ValueError("masks.matched = true belongs to method pwself: ibot masks in any case, and dino compares "
                             "no patches")
        return self

    @property
    def patch_color(self) -> str:
        """How patches are colored: `photometric.patchwise`, or `none` where no view gets it."""
        return self.photometric.patchwise if self.photometric.patch_share else "none"

    @property
    def masked(self) -> bool:
        """Does the student see its global views through masks?"""
        return self.method == "ibot" or self.masks.matched

    @model_validator(mode="after")
    def _batch_can_be_cut(self) -> Recipe:
        if self.optim.batch_size % self.optim.accumulate:
            raise ValueError(f"optim.batch_size = {self.optim.batch_size} cannot be cut into optim.accumulate = "
                             f"{self.optim.accumulate} equal parts; choose a divisor")
        return self

    @model_validator(mode="after")
    def _shards_need_no_scale(self) -> Recipe:
        if self.run.shard and self.optim.precision == "fp16":
            raise ValueError("run.shard = true cannot scale the loss of optim.precision = fp16; choose bf16 or fp32")
        return self
