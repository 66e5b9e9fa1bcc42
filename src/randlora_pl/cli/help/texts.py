"""Texts of the help pages; ``adapter``, ``analyze``, ``bench`` and their commands have theirs in their own modules."""

TEXTS = {
    "fit": """\
Train, and test the last weights; VisionLanguageTask and TextHeadTask also test the pretrained model before that.
Everything about the run goes to runs/NAME/TIME: config, TensorBoard, log, checkpoint, adapter, results.json.
runs/NAME/latest is a link to the newest run, and runs/NAME stands for its newest run in every command.

  randlora-pl fit --config quickstart
  randlora-pl fit --config clip_vitb32 --config lora --data.dataset cifar10 --data.shots 16
  randlora-pl fit --resume runs/quickstart/latest            goes on after a crash or Ctrl-C
""",
    "test": """\
Test an adapter on the test images of a dataset, or the pretrained model if no adapter is named.

  randlora-pl test --run runs/quickstart/latest              config and adapter of a run
  randlora-pl test --adapter FOLDER --config clip_vitb32 --data.dataset cifar10
""",
    "validate": """\
Test an adapter on the validation images, which are kept out of training.

  randlora-pl validate --run runs/quickstart/latest          config and adapter of a run
  randlora-pl validate --adapter FOLDER --config clip_vitb32 --data.dataset cifar10
""",
    "predict": """\
Classify images or texts with a trained adapter, or answer prompts. Writes a CSV file: image, class, probability and the
next best classes; or text, class ...; or prompt, written. Several adapters share one pass over the images and, where
they can, one base model; the file then has a line for each image and adapter: image, adapter, class, probability ...

  randlora-pl predict --adapter runs/quickstart/latest --images photos/ cat.jpg --output predictions.csv
  randlora-pl predict --adapter RUN --texts questions.txt
  randlora-pl predict --adapter runs/cars/latest pets=pets.safetensors --images photos/
  randlora-pl predict --adapter ADAPTER ADAPTER --weights 0.5 0.5 --images photos/

  --adapter [NAME=]PATH ...  Adapter folders, .safetensors files or runs, which know their base model, class names and
                        prompts; the default NAME is the part in which their paths differ
  --pretrained FILE     Weights file of a base model, where this machine does not know it; again for further ones. Of a
                        language model its folder
  --weights W ...       One model instead: the base and the sum of the adapters' updates, each W times; the classes
                        must be the same. One adapter and one W scale its update
  --images PATH ...     Image files, and folders that are searched
  --texts FILE ...      .txt with a text a line (- reads such lines from standard input); .jsonl or .csv with prompt,
                        text, or text_a and text_b, where labels and completions are left out
  --output FILE         CSV file to write; - prints it (default predictions.csv)
  --overwrite           Replace the file if it exists
  --top-k K             Classes listed for each (default 5)
  --max-new-tokens N    Most tokens that are written after a prompt (default: as in the training)
  --beams N             Beams of the search for them, 1 is greedy (default: as in the training)
  --precision P         Of language models: 32 (default), or bf16, as trained with bf16-mixed, in half the memory
  --batch-size N        Images or texts at a time (default 64, prompts 16)
  --device DEVICE       cpu, cuda, mps ... (default: what there is)
  --on-error ACTION     raise, or skip an unreadable image and go on
  --max-pixels N        Largest image, width x height (default 50000000)
""",
    "compare-methods": """\
Every method on one few-shot dataset over several seeds: a sweep, then a table of mean and standard error beside two
classifiers of raw pixels. The same command goes on after Ctrl-C, and only prints the table once all is done.

  randlora-pl compare-methods                                 16 shots of the digits, 3 seeds
  randlora-pl compare-methods --methods RandLoRA-6 --seeds 4 5

  --config SWEEP        The sweep to run: a shipped one or a file (default compare_methods)
  --methods NAME ...    Some of its methods
  --seeds N ...         Other seeds than the config's
  --tune                Search the learning rates on the validation images first, then run with the best
  --output DIR          The sweep's folder (default runs/sweeps/NAME); the table is DIR/table.md

and all other options of sweep, such as --jobs N and --dry-run: randlora-pl sweep --help
""",
    "zeroshot": """\
Test a pretrained CLIP: prompts of the dataset averaged, and the single prompt, beside the published accuracies.
Differences of more than a few tenths of a point hint at a wrong layout, class order or prompts.

  randlora-pl zeroshot                                        the tiny CLIP on the digits
  randlora-pl zeroshot --model.name ViT-B-32 --model.pretrained openai --data.dataset all

  --model.name NAME         An open_clip architecture (default tiny, which is shipped)
  --model.pretrained TAG    A tag of open_clip, a weights file, or random
  --data.dataset NAME       A dataset, or all: the paper's datasets that are on this machine (default digits)
  --data.root PATH          Folder that holds the data (default: the user's data folder)
  --data.eval_batch_size N  Images at a time (default 256)
  --device DEVICE           cpu, cuda, mps ... (default: what there is)
  --run.root FOLDER         zeroshot.json goes to FOLDER/zeroshot/TIME (default runs)
""",
    "data": """\
Get a dataset; is it what it should be, and what does it look like?

  randlora-pl data get NAME ... | --all        download, verify, unpack, check; or print the manual steps
  randlora-pl data check NAME ... | --all      images of each split and class beside what is expected
  randlora-pl data show NAME                   a contact sheet (PNG) with class names, split counts and prompts

  --root PATH      Folder that holds the data (default: the user's data folder); for folder, table, hf, pairs your own

  get: goes on where it was interrupted; 1 is returned where a dataset could not be had
  --keep           Keep the archives in PATH/downloads (default: removed once the check has passed)

  check: 0 is returned where all is as expected, 1 where something is off or missing, 2 after a wrong command
  --fast           Decode no image
  --every-image    Decode all images (default: 8 of each split)

  show:
  --output FILE    PNG file to write, a new one (default contact-sheet-NAME.png, which is replaced)
  --shots K        Training images of each class (default 4), as --data.shots K chooses them with seed 0
""",
    "report": """\
Tables and plots of a sweep, as Markdown, CSV and one HTML page that needs nothing else.

  randlora-pl report runs/sweeps/NAME
  randlora-pl report runs/sweeps/NAME --output docs/results/NAME --overwrite

  SWEEP            The folder of a sweep. It may still be running: cells without a result are marked. Or the folder of a
                   report, which is made again from its cells.csv
  --output DIR     Where to write (default SWEEP/report)
  --overwrite      Replace the report in it; other files stay

  index.html       A conclusion, and the difference of each method to a reference method with its interval. Then the
                   mean and 95 % confidence interval over seeds of every cell (each seed in its tooltip), averages over
                   the datasets that every compared method has, and the paper's value where the sweep names a table.
                   A verdict for each pair of methods whose rates were chosen by one rule, the rates, parameters, time
                   and memory, and how the report was made
  report.md        the same for a repository
  cells.csv        every run; summary.csv: every mean; sweep.yaml: the sweep
  figures/         Differences, accuracy against trained parameters, and memory on a GPU, as PNG and SVG
""",
    "compare": """\
Runs side by side: what differs in their configs, and their results, parameters, time and memory.

  randlora-pl compare runs/lora runs/randlora
  randlora-pl compare runs/sweeps/NAME/cells/* --json

  RUN RUN ...      Folders of runs, or runs/NAME for its newest run; damaged or unfinished ones are marked and shown
                   partially
  --json           Everything for another program: all options, all metrics
""",
    "serve": """\
Classify images over HTTP, with a page to drop images on (pip install '.[serve]' in the checkout).

  randlora-pl serve --adapter runs/quickstart/latest
  curl -F image=@photo.jpg 'http://127.0.0.1:8000/predict?top_k=3'
  curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:8000/predict

  --adapter ADAPTER        Folder, file or run; it knows its base model, class names and prompts
  --pretrained FILE        Weights file of the base model, where this machine does not know it
  --host ADDRESS           127.0.0.1 for this machine alone (default), 0.0.0.0 or :: for all
  --port PORT              (default 8000)
  --token TOKEN            Answer only requests with the header Authorization: Bearer TOKEN; others see it in the list
                           of processes, but not the environment variable RANDLORA_PL_TOKEN, which does the same
  --allow-host NAME ...    Further names in requests' Host, such as a proxy's (default: this machine's)
  --device DEVICE          cpu, cuda, cuda:1, mps ... (default: what there is)
  --workers N              Processes with a model of their own (default 1); one GPU is kept busy by one
  --batch-size N           Images that are classified together at most (default 16)
  --batch-timeout SECONDS  How long to wait for a batch to fill (default 0.01); 0 takes what is there
  --max-upload-mb MB       Larger uploads are refused with 413, far larger ones before they are read (default 20)
  --max-pixels N           Larger images are refused with 413 by their header (default 50,000,000)
  --samples FOLDER         Offer images of this folder on the page, to everyone who can reach it

POST /predict gives {"classes": [{"name": "cat", "probability": 0.93}, ...]}, the probabilities of `predict`.
What cannot be answered gives a 4xx or 5xx with {"detail": "what is wrong"}. GET / is the page; GET /health
returns model, classes and limits, with 200 once requests are answered. 128 requests at a time; more give 503.
Headers must come within 10 s, uploads within 60 s. With a token, the page (which asks for it) and the status of
GET /health stay open.
Ctrl-C or SIGTERM ends it, and answers what is being asked.
""",
    "sweep": """\
Run a grid of models, datasets, budgets, methods and seeds. Each cell is a run folder; what is done is never done
again, so the same command goes on after a crash, Ctrl-C or a reboot, and several processes may work on one sweep.

  randlora-pl sweep offline --dry-run
  randlora-pl sweep offline --jobs 2
  randlora-pl sweep mine.yaml --tune          searches the learning rates first, see: randlora-pl tune --help
  randlora-pl sweep table11 --only budget=16-shot dataset=dtd,eurosat --max-hours 8
  randlora-pl sweep table11 --launcher slurm --jobs 16 --slurm slurm_partition=gpu gpus_per_node=1 timeout_min=600

  CONFIG                What to run: a shipped config (randlora-pl config list) or a file
  --output DIR          The sweep's folder (default runs/sweeps/NAME); cells of another grid in it are kept
  --dry-run             Only list the cells, with their state and the time and memory that they are expected to take
  --only KEY=VALUE ...  Some cells: model, dataset, budget, method or seed; several values with commas
  --seeds N ...         Other seeds than the config's
  --shard I/N           Every N-th cell, beginning with the I-th: for machines that share no disk
  --retry-failed        Run cells again that failed before
  --max-hours H         Begin no cell that is not expected to end within this time
  --skip-missing        Leave out datasets that are not on this machine
  --data.root DIR       Folder that holds the datasets, or the place of your own (folder, table ...), if the config
                        gives none
  --tune                Search the learning rates on validation samples, then run with the best. The config's part
                        `tune` sets the candidates; resumes after a kill, too. The search is in DIR/tune
  --jobs N              Processes that share the work (default 1)
  --launcher WHERE      local (default), or slurm: an array of N jobs by submitit; in the checkout:
                        pip install '.[slurm]'
  --slurm KEY=VALUE ... Options of submitit for it
""",
    "tune": """\
Search the learning rate (and alpha) of every method of a sweep on validation samples; the test is not read.
Each candidate is tried with one seed, the two best with all seeds of the search; the best mean is taken. The same
command goes on where it stopped. Writes what was tried (tuning.md and .json) and a config with the best (tuned.yaml).

  randlora-pl tune offline --dry-run
  randlora-pl tune offline --jobs 2
  randlora-pl sweep runs/tune/offline/tuned.yaml         or both at once: randlora-pl sweep offline --tune
  randlora-pl tune --config quickstart --data.shots 16   the rate of a single run, with the options of fit

The config's part `tune` sets the candidates:
  tune: {learning_rates: [1e-3, 1e-2], alphas: [1, 10], seeds: [0, 4], datasets: [digits], budgets: [16], set: {...}}
`monitor: val/loss` takes the lowest loss instead of the best val/acc (of GLUE's tasks also val/score).
With `climb: true` a method begins at its own rate and the two beside it, and goes on while the best is outermost.
seeds must be others than the sweep's; without datasets and budgets all of the sweep's are taken, without alphas none.

  CONFIG                What to tune: a shipped config of a sweep or a file
  --output DIR          Where to put it (default runs/tune/NAME)
  --dry-run             Only list the cells of the first round, with the time and memory that they are expected to take
  --only KEY=VALUE ...  Some of it: model or dataset, or methods by their labels in the config (method=LoRA-16)
  --retry-failed        Run candidates again that failed before (a diverged one fails again)
  --max-hours H         Begin no run that is not expected to end within this time
  --skip-missing        Leave out datasets that are not on this machine
  --data.root DIR       Folder that holds the datasets, or the place of your own (folder, table ...), if the config
                        gives none
  --jobs N              Processes that share the work (default 1)
""",
    "datasets": """\
List the datasets (datasets), or show some of them in full (datasets NAME ...).

  --root PATH      Folder in which to look for the data (default: the user's data folder)
  --json           The same for another program
""",
    "models": """\
List backbones with their sizes, weights and configs (models), or some (models NAME ...).

  --json           The same for another program
""",
    "adapters": """\
List the methods (adapters), or explain the options of some of them (adapters NAME ...).

  --json           The same for another program, with all options
""",
    "config": """\
The shipped configs.

  config list            what there is; with --json for another program
  config cat NAME        print one
  config cp NAME [FILE]  copy one, to change it; an existing file is not overwritten
  config check FILE      print all mistakes of a config, each with its line; 2 is returned if there are any
""",
    "doctor": """\
Say whether a run can start here; then show versions, devices, data, cached weights and network.

  --all            List datasets and weights that are not on this machine, too, and how to get them
  --json           All of it for another program
""",
    "completion": """\
Print a script with which the shell completes commands, options and choices.

  eval "$(randlora-pl completion bash)"                        in ~/.bashrc
  randlora-pl completion zsh > ~/.zfunc/_randlora-pl           with fpath+=~/.zfunc before compinit in ~/.zshrc
  randlora-pl completion fish > ~/.config/fish/completions/randlora-pl.fish
""",
}
