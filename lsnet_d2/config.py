"""Config keys that LSNet adds to Detectron2's."""

from detectron2.config import CfgNode as CN


def add_lsnet_config(cfg: CN) -> None:
    """Add the keys of LSNet to a Detectron2 config, in place. Idempotent.

    Call it on ``detectron2.config.get_cfg()`` before merging one of our YAML files.
    """
    if "LSNET" in cfg.MODEL:
        return

    cfg.MODEL.LSNET = CN()
    # What is learned: "bbox", "segm", "pose_bbox", "pose_kbox", or "joint" (see BRANCHES).
    cfg.MODEL.LSNET.TASK = "bbox"
    # Landmark branches of the joint task, in order. The first one supplies the boxes for
    # assignment and NMS, the last one steers where classification samples.
    cfg.MODEL.LSNET.BRANCHES = ["extreme"]
    # Number of object classes.
    cfg.MODEL.LSNET.NUM_CLASSES = 80
    # Feature maps that the head runs on, finest first. At least three.
    cfg.MODEL.LSNET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Vertices of a contour (branch "contour"), 8 to 128.
    cfg.MODEL.LSNET.NUM_CONTOUR_POINTS = 36
    # Keypoints of a pose (branch "keypoint"); their names, flip pairs and skeleton are those of
    # the data set.
    cfg.MODEL.LSNET.NUM_KEYPOINTS = 17
    # Classes (from 0) that have keypoints; those of other objects get the score 0. Empty: all.
    cfg.MODEL.LSNET.KEYPOINT_CLASSES = []

    # --- head
    # Convolutions of the towers: "dcn" (modulated deformable, as in the paper) or "conv" (faster).
    cfg.MODEL.LSNET.TOWER_CONV = "dcn"
    # Convolutions in each tower; they have MODEL.FPN.OUT_CHANNELS channels, a multiple of 32.
    cfg.MODEL.LSNET.NUM_CONVS = 3
    # Score that every class has before training (bias of the classifier).
    cfg.MODEL.LSNET.PRIOR_PROB = 0.01
    # Whether the refine stage and the classes sample features at the initial landmarks, on three
    # levels of the pyramid. False: they see their own surroundings alone, in much less time; a
    # third stage still samples, at the points that matter.
    cfg.MODEL.LSNET.REFINE_SAMPLING = True
    # Scaling of the sampling offsets between pyramid levels. False: every level scales them once.
    # True: as in the released code, where the scale factors pile up over the three levels; its
    # checkpoints need it (docs/reference_notes.md).
    cfg.MODEL.LSNET.REFERENCE_OFFSETS = False
    # Share of the gradient that flows from the sampling locations back into the initial vectors.
    cfg.MODEL.LSNET.OFFSET_GRADIENT_MUL = 0.1
    # Corner point verification: heat maps of corners and a semantic map inform the head, and boxes
    # are moved to the corners found. For tasks whose boxes lie between extreme points, without the
    # third stage.
    cfg.MODEL.LSNET.CPV = False

    # Feature maps of the backbone, finest first, that a third stage looks at, which moves each
    # landmark of the points that matter (not in the paper). Empty: there is no third stage.
    cfg.MODEL.LSNET.POLISH_IN_FEATURES = []
    # How often it does so, each time with weights of its own.
    cfg.MODEL.LSNET.POLISH_STEPS = 1
    # How many times more the last step is made in tests, with the same weights.
    cfg.MODEL.LSNET.POLISH_REPEATS_TEST = 0
    # Rows and columns of a grid of points in each object's box that it looks at, beside landmarks.
    cfg.MODEL.LSNET.POLISH_GRID = 0
    # Anchor points of each object, taken at random from those of the refine stage, that it learns
    # from: they see nearly the same. 0: all.
    cfg.MODEL.LSNET.POLISH_POSITIVES = 0
    # Points of the background of an image, those that look most like objects, that also teach it
    # what is none.
    cfg.MODEL.LSNET.POLISH_NEGATIVES = 12

    # Where there are contours, let maps teach the first of these features, after two convolutions:
    # of each cell the classes that cover it, and where the nearest outline is.
    cfg.MODEL.LSNET.OUTLINE_MAPS = True
    # Where there are contours, let the third stage say of a lattice of places in an object's box
    # which of them the object covers, and trace the final contour along these, with so many
    # vertices. 0: final contours have the vertices that the network predicts. Without a third stage
    # they always have.
    cfg.MODEL.LSNET.TRACED_POINTS = 0
    # Give each kind of keypoint a map, on which the third stage seeks it around the place where it
    # was taken to be. Without a third stage there is none.
    cfg.MODEL.LSNET.KEYPOINT_SEARCH = False
    # Convolutions that these maps alone go through, behind the two of the features that the third
    # stage looks at.
    cfg.MODEL.LSNET.KEYPOINT_SEARCH_CONVS = 0

    # The third stage also predicts how good its landmarks are, as those of each class. Scores of
    # detections are the class's to the power of 1 - share, times the predicted quality to the power
    # of this share.
    cfg.MODEL.LSNET.QUALITY_SHARE_TEST = 0.3

    # --- targets and losses
    # Length given to the unused side of a vector, relative to the used one.
    cfg.MODEL.LSNET.CROSS_IOU_ALPHA = 0.2
    # Anchor points that each object takes in the init stage (1 in the paper).
    cfg.MODEL.LSNET.INIT_POSITIVES = 1
    # Candidates per pyramid level and object in the ATSS assignment of the refine stage.
    cfg.MODEL.LSNET.ATSS_TOPK = 9
    # Leave anchor points inside crowd objects, and inside objects without what the first branch
    # learns or whose keypoints span no box, out of the losses of classes, of corner verification
    # and of the third stage's maps and hard negatives. False: such points are background, as in the
    # released code.
    cfg.MODEL.LSNET.IGNORE_CROWD = True
    cfg.MODEL.LSNET.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.LSNET.FOCAL_LOSS_GAMMA = 2.0
    cfg.MODEL.LSNET.CLS_LOSS_WEIGHT = 1.0
    # Teach the class at a point as much as the box there overlaps with the object's (quality focal
    # loss, arXiv 2006.04388, without FOCAL_LOSS_ALPHA) instead of 1: boxes of parts score less. Not
    # where the first branch is that of keypoints.
    cfg.MODEL.LSNET.CLS_SOFT_LABELS = False
    # Weights of the landmark losses of each branch in order, init and refine stage. Empty: the
    # paper's for the task; 1 and 2 for every branch of a joint model.
    cfg.MODEL.LSNET.INIT_LOSS_WEIGHTS = []
    cfg.MODEL.LSNET.REFINE_LOSS_WEIGHTS = []
    # Weights of the third stage's losses: of its landmarks, and of the quality that it predicts.
    cfg.MODEL.LSNET.POLISH_LOSS_WEIGHT = 0.5
    cfg.MODEL.LSNET.QUALITY_LOSS_WEIGHT = 0.25
    # What 1 minus the IOU of a contour's area weighs in the third stage (elsewhere nothing), beside
    # the displacements of its vertices. POLISH_LOSS_WEIGHT applies to both.
    cfg.MODEL.LSNET.CONTOUR_AREA_LOSS_WEIGHT = 0.0
    # Weight of the loss of the search for keypoints.
    cfg.MODEL.LSNET.KEYPOINT_SEARCH_LOSS_WEIGHT = 0.25
    # Weight of the loss of the masks that contours are traced along.
    cfg.MODEL.LSNET.MASK_LOSS_WEIGHT = 2.0
    # Weights of the losses of maps of outlines: of what covers a cell, of where an outline is.
    cfg.MODEL.LSNET.OUTLINE_MAPS_LOSS_WEIGHTS = [4.0, 0.5]
    # Weights of the losses of corner verification: heat maps, offsets, semantic map.
    cfg.MODEL.LSNET.CPV_LOSS_WEIGHTS = [0.25, 1.0, 0.1]
    # What an object of KEYPOINT_CLASSES without a labelled keypoint teaches the pose. False:
    # nothing. True: the vector to its centre, as in the released code.
    cfg.MODEL.LSNET.TRAIN_UNLABELLED_POSES = False

    # --- inference (TEST.DETECTIONS_PER_IMAGE holds too)
    # Least score of a class; a third stage may judge what has it still lower.
    cfg.MODEL.LSNET.SCORE_THRESH_TEST = 0.05
    # Anchor points kept per pyramid level before NMS.
    cfg.MODEL.LSNET.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.LSNET.NMS_THRESH_TEST = 0.6
    # Multiply the scores of what NMS keeps by exp(-IOU^2 / sigma), of the largest IOU with a better
    # detection of the class (as in Soft-NMS, arXiv 1704.04503). 0: leave them.
    cfg.MODEL.LSNET.SOFT_NMS_SIGMA_TEST = 0.0
    # Detections whose box has no larger area, in square pixels of the original image, are
    # dropped (1024 in the released code's evaluation of poses).
    cfg.MODEL.LSNET.MIN_BOX_AREA_TEST = 0.0

    # --- test-time augmentation, besides Detectron2's TEST.AUG.ENABLED, MIN_SIZES, MAX_SIZE, FLIP
    # For each of MIN_SIZES the [least, largest] object that counts: the square root of its box's
    # area in pixels of the resized image. Empty: all count in all.
    cfg.TEST.AUG.SIZE_RANGES = []
    # How detections of the augmented images are put together: "vote" takes the weighted mean of
    # those that overlap, as in the released code, "nms" the best one. Contours that are traced
    # along masks have no mean, and with FLIP others only where CONTOUR_SAMPLING is "reference".
    cfg.TEST.AUG.METHOD = "vote"
    # IOU from which on boxes vote together.
    cfg.TEST.AUG.VOTE_IOU = 0.66
    # Detections that are left after they were put together (1000 in the released code); 0: as many
    # as of each augmented image, TEST.DETECTIONS_PER_IMAGE.
    cfg.TEST.AUG.DETECTIONS_PER_IMAGE = 0

    # Keep only the inputs of the residual blocks for the backward pass, which computes the rest
    # anew: less memory, more time, the same numbers. Not for batch norm that gathers statistics.
    cfg.MODEL.RESNETS.ACTIVATION_CHECKPOINTING = False

    # Res2Net has MODEL.RESNETS too; its WIDTH_PER_GROUP is the channels of a split in res2.
    cfg.MODEL.RES2NET = CN()
    # Splits of the channels in a block, of which all but one are convolved.
    cfg.MODEL.RES2NET.SCALES = 4

    # EfficientNet-Lite0; MODEL.BACKBONE.FREEZE_AT holds too (1: the stem, n: n - 1 stages more).
    cfg.MODEL.EFFICIENTNET = CN()
    cfg.MODEL.EFFICIENTNET.OUT_FEATURES = ["stride8", "stride16", "stride32"]
    # "FixedBN": statistics fixed, weight and bias trained, as in the released code; or a norm of
    # Detectron2's. MODEL.RESNETS.NORM may be "FixedBN" too.
    cfg.MODEL.EFFICIENTNET.NORM = "FixedBN"

    # Detectron2's FCOS, whose own configs are Python files; the values are theirs.
    cfg.MODEL.FCOS = CN()
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions in each of the two towers, and the norm behind each.
    cfg.MODEL.FCOS.NUM_CONVS = 4
    cfg.MODEL.FCOS.NORM = "GN"
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    # How far from an object's centre its positives may lie, in strides.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # Scores are the root of the class's times the centreness, and so larger than RetinaNet's.
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6

    # Where the mapper takes extreme points from: "segmentation" derives them from the augmented
    # mask, "annotation" reads the key "extreme_points" written by tools/gen_coco_lsvr.py.
    cfg.INPUT.EXTREME_POINTS = "segmentation"

    # How the mapper places the vertices of contours: "adaptive", or "reference" as the released
    # code does it.
    cfg.INPUT.CONTOUR_SAMPLING = "adaptive"

    # Batch for which the learning rate and the iterations are written. The tools that train scale
    # them for another IMS_PER_BATCH (lsnet_d2/solver.py), but for keys given on the command line. A
    # config file with a batch and a schedule of its own sets it to that batch, or to 0: no scaling.
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0
    # Parts in which a batch is computed, one after the other, to save memory. The losses of each
    # part are divided by its own number of positives.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Of what SOLVER.AMP.ENABLED computes in lower precision: "float16", "bfloat16", or "auto",
    # which is float16 on CUDA and bfloat16 elsewhere.
    cfg.SOLVER.AMP.PRECISION = "auto"
    # "SGD", or "AdamW", which does not use MOMENTUM and NESTEROV.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Learning rate of the network under the pyramid, whose weights are imported, relative to
    # BASE_LR.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0

    # Data sets to register: lists of a name, a file in COCO's format, and the folder of its images
    # (tools/check_dataset.py --write-config).
    cfg.DATASETS.COCO_FILES = []
    # What to do about training annotations whose box is malformed, empty or outside its image:
    # "error" stops and names them, "drop" leaves them out and logs their number.
    cfg.DATASETS.INVALID_ANNOTATIONS = "error"

    # Exponential moving average of the weights. It is what is evaluated, and what checkpoints have
    # for the model; the trained weights are in them too, to go on from.
    cfg.SOLVER.EMA = CN()
    cfg.SOLVER.EMA.ENABLED = False
    # Share of the mean that an iteration keeps; the n-th keeps (n - 1) / (n + 8) at most.
    cfg.SOLVER.EMA.DECAY = 0.9998

    # Whether the losses of DATASETS.TEST, without augmentation, are computed with each evaluation
    # of TEST.EVAL_PERIOD; "validation/total_loss" and others in metrics.json.
    cfg.TEST.VALIDATION_LOSS = False
    # Metric of metrics.json, such as "bbox/AP", whose best value in the evaluations of
    # TEST.EVAL_PERIOD makes the checkpoint model_best.pth. Empty: none is kept.
    cfg.TEST.BEST_METRIC = ""
    # Whether the best value of it is the "max" or the "min".
    cfg.TEST.BEST_MODE = "max"
    # Evaluations in a row without a better value, after which the training ends. 0: it does not.
    cfg.TEST.PATIENCE = 0
