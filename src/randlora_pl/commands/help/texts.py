"""Texts of the help pages; ``adapter``, ``analyze``, ``bench`` and their commands have theirs in their own modules."""

TEXTS = {
    "fit": """\
Train an adapter, then test it; VisionLanguageTask, TextHeadTask and PromptTask also test the pretrained model.
Everything about the run is written to runs/NAME/TIME: config, TensorBoard, log, checkpoint, adapter, results.json.
runs/NAME/latest is a link to the newest run, and runs/NAME stands for its newest run in every command.

  randlora-pl fit --config quickstart
  randlora-pl fit --config clip_vitb32 --config lora --data.dataset cifar10 --data.shots 16
  randlora-pl fit --resume runs/quickstart/latest            resume after a crash or Ctrl-C
""",
    "test": """\
Test an adapter on the test images of a dataset. Without an adapter, test the pretrained model.

  randlora-pl test --run runs/quickstart/latest              the config and adapter of a run
  randlora-pl test --adapter FOLDER --config clip_vitb32 --data.dataset cifar10
""",
    "validate": """\
Test an adapter on the validation images, which are not used for training. Use it to choose hyperparameters.

  randlora-pl validate --run runs/quickstart/latest          the config and adapter of a run
  randlora-pl validate --adapter FOLDER --config clip_vitb32 --data.dataset cifar10
""",
    "predict": """\
Classify images or texts with a trained adapter, or answer prompts. The result is a CSV file with the columns image,
class, probability and the next best classes. For texts the first column is text, and for prompts the columns are prompt
and written. Several adapters share one pass over the images and, if possible, one base model. The file then has a line
per image and adapter.

  randlora-pl predict --adapter runs/quickstart/latest --images photos/ cat.jpg --output predictions.csv
  randlora-pl predict --adapter RUN --texts questions.txt
  randlora-pl predict --adapter runs/cars/latest pets=pets.safetensors --images photos/
  randlora-pl predict --adapter ADAPTER ADAPTER --weights 0.5 0.5 --images photos/

  --adapter [NAME=]PATH ...  Adapter folders, .safetensors files or runs. They know their base model, class names and
                        prompts. Without NAME, the part of the path that differs is used
  --pretrained FILE     Weights file (or folder, for a language model) of a base model that this machine does not have.
                        Repeat it for further base models
  --weights W ...       Merge the adapters into one model with these weights. All adapters must have the same classes.
                        With one adapter, W scales its update
  --images PATH ...     Image files, and folders to search
  --classnames FILE     Other classes than the adapter's, one name per line. Only prompts (PromptTask) can name them
  --texts FILE ...      .txt with one text per line (- reads standard input), or .jsonl or .csv with the column prompt,
                        text, or text_a and text_b. Labels and completions are ignored
  --output FILE         CSV file to write, or - to print it (default: predictions.csv)
  --overwrite           Replace the file if it exists
  --top-k K             Number of classes listed per image or text (default: 5)
  --max-new-tokens N    Most tokens to generate per prompt (default: as in training)
  --beams N             Number of beams of the search, 1 is greedy (default: as in training)
  --precision P         32, tf32 (faster products on NVIDIA GPUs from 2020 or later), or bf16 as in training with
                        bf16-mixed, which also halves the memory of a language model (default: 32)
  --batch-size N        Images or texts per batch (default: 64, or 16 prompts)
  --device DEVICE       cpu, cuda, mps ... (default: the best available)
  --on-error ACTION     raise, or skip to leave out unreadable images (default: raise)
  --max-pixels N        Largest image, width x height (default: 50000000)
""",
    "compare-methods": """\
Compare all methods on one few-shot dataset over several seeds. The command runs a sweep, then prints the mean and
standard error of each method and of two classifiers of raw pixels. Run the same command again to resume after Ctrl-C.

  randlora-pl compare-methods                                 16 shots of the digits, 3 seeds
  randlora-pl compare-methods --methods RandLoRA-6 --seeds 4 5

  --config SWEEP        Sweep to run: a bundled one or a file (default: compare_methods)
  --methods NAME ...    Run only these methods
  --seeds N ...         Seeds to use instead of the config's
  --tune                Search the learning rates on validation images first, then run with the best ones
  --output DIR          Folder of the sweep (default: runs/sweeps/NAME). The table is DIR/table.md

All other options of sweep work, too, such as --jobs N and --dry-run. See: randlora-pl sweep --help
""",
    "zeroshot": """\
Test a pretrained CLIP with the dataset's averaged prompts and with a single prompt, and print the published accuracies.
A difference of more than a few tenths of a point suggests a wrong layout, class order or prompt.

  randlora-pl zeroshot --model.name tiny                      the tiny CLIP on the digits
  randlora-pl zeroshot --model.name ViT-B-32 --model.pretrained openai --data.dataset all

  --model.name NAME         An open_clip architecture, or tiny, which is bundled
  --model.pretrained TAG    A tag of open_clip, a weights file, or random
  --data.dataset NAME       A dataset, or all: the paper's datasets that are on this machine (default: the format of
                            --data.root, else digits)
  --data.root PATH          Folder with the data (default: the user's data folder)
  --data.eval_batch_size N  Images per batch (default: 256)
  --device DEVICE           cpu, cuda, mps ... (default: the best available)
  --run.root FOLDER         zeroshot.json is written to FOLDER/zeroshot/TIME (default: runs)
""",
    "data": """\
Download, verify and preview datasets.

  randlora-pl data get NAME ... | --all        download, verify and unpack; or print the manual steps
  randlora-pl data check NAME ... | --all      compare the images per split and class with the expected numbers
  randlora-pl data show NAME                   draw a contact sheet (PNG) with class names, split counts and prompts

  --root PATH      Folder with the data (default: the user's data folder), or your own folder, table, hf or pairs data

get resumes an interrupted download. It exits with 1 if a dataset could not be downloaded.
  --keep           Keep the archives in PATH/downloads (default: delete them after the check)

check exits with 0 if everything is as expected, 1 if something differs or is missing, 2 if the command is invalid.
  --fast           Decode no images
  --every-image    Decode all images (default: 8 per split)
  --split coop     Check the splits of CoOp instead of the usual ones

show:
  --output FILE    New PNG file (default: contact-sheet-NAME.png, which is replaced)
  --shots K        Training images per class, as --data.shots K selects them with seed 0 (default: 4)
""",
    "report": """\
Write tables and plots of a sweep as Markdown, CSV and one self-contained HTML page.

  randlora-pl report runs/sweeps/NAME
  randlora-pl report runs/sweeps/NAME --output docs/results/NAME --overwrite

  SWEEP            Folder of a sweep, even one that is still running: cells without a result are marked. Or the folder
                   of a report, which is regenerated from its cells.csv
  --output DIR     Folder to write (default: SWEEP/report)
  --overwrite      Replace the report in that folder. Other files stay

  index.html       The conclusion, and the difference of each method to a reference method with its interval. Then every
                   cell with its mean and 95 % confidence interval over seeds, and averages over the datasets that all
                   compared methods have. The paper's values, if the sweep names a table. A verdict per pair of methods
                   with comparable rates, the rates, the costs, and how the report was made
  report.md        The same content for a repository
  cells.csv        Every run. summary.csv has every mean, and sweep.yaml the sweep
  figures/         Plots of differences, of accuracy against parameters, and of GPU memory, as PNG and SVG
""",
    "compare": """\
Compare runs: what differs in their configs, and their results, parameters, time and memory.

  randlora-pl compare runs/lora runs/randlora
  randlora-pl compare runs/sweeps/NAME/cells/* --json

  RUN RUN ...      Folders of runs, or runs/NAME for its newest run. Damaged or unfinished ones are marked and shown
                   partially
  --json           Print all options and metrics as JSON
""",
    "serve": """\
Classify images over HTTP, with a web page to drop images on (pip install '.[serve]' in the checkout).

  randlora-pl serve --adapter runs/quickstart/latest
  curl -F image=@photo.jpg 'http://127.0.0.1:8000/predict?top_k=3'
  curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:8000/predict

  --adapter ADAPTER        Folder, file or run of an image adapter. It knows its base model, class names and prompts
  --pretrained FILE        Weights file of a base model that this machine does not have
  --host ADDRESS           127.0.0.1 for this machine only, 0.0.0.0 or :: for all (default: 127.0.0.1)
  --port PORT              TCP port (default: 8000)
  --token TOKEN            Answer only requests with the header Authorization: Bearer TOKEN. Other users can see the
                           option in the list of processes, but not the environment variable RANDLORA_PL_TOKEN
  --allow-host NAME ...    Further names in the Host header, such as a proxy's (default: this machine's)
  --device DEVICE          cpu, cuda, cuda:1, mps ... (default: the best available)
  --precision P            32, tf32 (faster products on NVIDIA GPUs from 2020 or later), or bf16 as in training with
                           bf16-mixed (default: 32)
  --workers N              Processes with a model of their own (default: 1). One worker per GPU is usually enough
  --batch-size N           Most images per batch (default: 16)
  --batch-timeout SECONDS  Time to wait for a batch to fill (default: 0.01). 0 does not wait
  --max-upload-mb MB       Larger uploads get status 413, much larger ones before they are read (default: 20)
  --max-pixels N           Larger images get status 413 after reading their header (default: 50,000,000)
  --samples FOLDER         Offer images of this folder on the page, to everyone who can reach it

POST /predict returns {"classes": [{"name": "cat", "probability": 0.93}, ...]} with the probabilities of `predict`.
Errors return a 4xx or 5xx status with {"detail": "what is wrong"}. GET / is the page. GET /health returns model,
classes and limits, with status 200 as soon as the server is ready. At most 128 requests are processed at a time. More
get status 503. Headers must arrive within 10 s, uploads within 60 s. With a token, the page (which asks for it) and the
status of GET /health stay public.
On Ctrl-C or SIGTERM the server finishes open requests, then exits.
""",
    "sweep": """\
Run a grid of models, datasets, budgets, methods and seeds. Each cell is a run folder. Finished cells are skipped, so
you can run the same command again after a crash, Ctrl-C or a reboot. Several processes can share a sweep.

  randlora-pl sweep offline --dry-run
  randlora-pl sweep offline --jobs 2
  randlora-pl sweep mine.yaml --tune          search the learning rates first (randlora-pl tune --help)
  randlora-pl sweep table11 --only budget=16-shot dataset=dtd,eurosat --max-hours 8
  randlora-pl sweep table11 --launcher slurm --jobs 16 --slurm slurm_partition=gpu gpus_per_node=1 timeout_min=600

  CONFIG                Sweep to run: a bundled config (randlora-pl config list) or a file
  --output DIR          Folder of the sweep (default: runs/sweeps/NAME). Cells of another grid in it are kept
  --dry-run             Only list the cells with their state and their expected time
  --only KEY=VALUE ...  Run only some cells, by model, dataset, budget, method or seed. Separate values with commas
  --seeds N ...         Seeds to use instead of the config's
  --shard I/N           Run every N-th cell, starting with the I-th, for machines without a shared disk
  --retry-failed        Run failed cells again
  --max-hours H         Start no cell that is not expected to end within this time
  --skip-missing        Skip datasets that are not on this machine
  --data.root DIR       Folder with the datasets, or the place of your own data (folder, table ...), if the config has
                        none
  --tune                Search the learning rates on validation samples, then run with the best ones. The config's
                        section `tune` describes the search, which is in DIR/tune and resumes after a kill
  --jobs N              Processes that share the work (default: 1)
  --launcher WHERE      local, or slurm for an array of N jobs (default: local). slurm needs submitit:
                        pip install '.[slurm]' in the checkout
  --slurm KEY=VALUE ... Options of submitit
""",
    "tune": """\
Search the learning rate, and any other option, of each method of a sweep on validation samples. Test samples are not
read. Each candidate is tried with one seed, then the best two with all seeds of the search. The best mean wins. Run the
same command again to resume. It writes all results (tuning.md and .json) and a config with the best (tuned.yaml).

  randlora-pl tune offline --dry-run
  randlora-pl tune offline --jobs 2
  randlora-pl sweep runs/tune/offline/tuned.yaml         or both at once: randlora-pl sweep offline --tune
  randlora-pl tune --config quickstart --data.shots 16   the rate of a single run, with the options of fit
  randlora-pl tune -c quickstart --search learning_rate=1e-4..1e-1 rank=1..32 --sampler tpe --pruner median

The config's section `tune` has the same, and what to search on:
  tune: {search: {learning_rate: [1e-3, 1e-2], rank: [4, 8]}, sampler: grid, seeds: [0, 4], datasets: [digits],
         budgets: [16], monitor: val/acc, set: {...}}
`monitor: val/loss` selects the lowest loss instead of the best val/acc (for GLUE also val/score). The seeds must differ
from the sweep's. The defaults are seed 0, and all datasets and budgets of the sweep.

  CONFIG                Sweep to tune: a bundled config or a file
  --search NAME=VALUES ...
                        Options to search: learning_rate, options of the adapter, or data.batch_size and the like, each
                        with values (1,2,4) or a range (1..64) (default: the learning rate, by factors of two)
  --sampler NAME        climb from each method's own rate while the best one is at the edge (default), grid for all
                        values, or tpe for candidates that Optuna selects
  --trials N            Candidates of each method with tpe (default: 20)
  --pruner NAME         With tpe, end worse runs early: median, or halving (default: none)
  --output DIR          Folder to write (default: runs/tune/NAME)
  --dry-run             Only list the cells of the first round with their expected time
  --only KEY=VALUE ...  Tune only some models, datasets or methods, by their labels in the config (method=LoRA-16)
  --retry-failed        Run failed candidates again (a diverged one fails again)
  --max-hours H         Start no run that is not expected to end within this time
  --skip-missing        Skip datasets that are not on this machine
  --data.root DIR       Folder with the datasets, or the place of your own data (folder, table ...), if the config has
                        none
  --jobs N              Processes that share the work (default: 1)
""",
    "datasets": """\
List the datasets (datasets), or show some of them in full (datasets NAME ...).

  --root PATH      Folder to search for the data (default: the user's data folder)
  --json           Print the result as JSON
""",
    "models": """\
List backbones with their sizes, weights and configs (models), or some (models NAME ...).

  --all            Every architecture of open_clip and timm: what is adapted, and if preprocessing is the library's
  --json           Print the result as JSON
""",
    "adapters": """\
List the methods (adapters), or explain the options of some of them (adapters NAME ...).

  --json           Print the result as JSON, with all options
""",
    "config": """\
List, print, copy and check configs.

  config list            list the bundled configs (--json prints JSON)
  config cat NAME        print one
  config cp NAME [FILE]  copy one so that you can change it. An existing file is not overwritten
  config check FILE      print all mistakes of a config with their lines. It exits with 2 if there are any
""",
    "doctor": """\
Check if a run can start here. Then print versions, devices, data, cached weights and network.

  --all            Also list datasets and weights that are not on this machine, and how to get them
  --json           Print the result as JSON
""",
    "completion": """\
Print a script that lets the shell complete commands, options and choices.

  eval "$(randlora-pl completion bash)"                        in ~/.bashrc
  randlora-pl completion zsh > ~/.zfunc/_randlora-pl           with fpath+=~/.zfunc before compinit in ~/.zshrc
  randlora-pl completion fish > ~/.config/fish/completions/randlora-pl.fish
""",
}
