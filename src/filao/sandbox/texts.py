"""Everything that the demo says, in English and in French: one table, and how each language writes numbers."""

from typing import Literal, get_args

Language = Literal["en", "fr"]
LANGUAGES: tuple[Language, ...] = get_args(Language)

_NO_BREAK = "\N{NO-BREAK SPACE}"

TEXTS: dict[str, tuple[str, str]] = {
    # --- the head --------------------------------------------------------------------------------
    "title": ("Filao · EVT-02 · competing consumers", "Filao · EVT-02 · consommateurs concurrents"),
    "told": (
        "A portal sends {count} claims; {workers} worker processes compete for them.",
        "Un portail envoie {count} sinistres que {workers} agents se disputent.",
    ),
    "told_alone": (
        "A portal sends {count} claims; one worker process handles them.",
        "Un portail envoie {count} sinistres qu'un seul agent traite.",
    ),
    "told_kill": ("Half-way, a worker is killed.", "À mi-chemin, un agent est tué."),
    "clock": ("{seconds} s", "{seconds} s"),
    # --- the flow --------------------------------------------------------------------------------
    "portal": ("portal", "portail"),
    "queue": ("queue", "file"),
    "done": ("handled", "traités"),
    "pid": ("pid {pid}", "pid {pid}"),
    "of": ("{some} of {all}", "{some} sur {all}"),
    "rate": ("{rate}/s", "{rate}/s"),
    "ready": ("ready", "prêts"),
    "leased": ("leased", "en main"),
    "delayed": ("delayed", "différés"),
    "dead": ("dead", "morts"),
    "oldest": ("oldest", "doyen"),
    # --- the workers -----------------------------------------------------------------------------
    "col_worker": ("worker", "agent"),
    "col_pid": ("pid", "pid"),
    "col_state": ("state", "état"),
    "col_claim": ("claim in hand", "sinistre en main"),
    "col_attempt": ("attempt", "essai"),
    "col_handled": ("handled", "traités"),
    "col_share": ("share", "part"),
    "starting": ("starting", "démarre"),
    "waiting": ("waiting", "attend"),
    "evaluating": ("evaluating", "évalue"),
    "killed": ("killed", "tué"),
    "ended": ("ended", "terminé"),
    "and_more": ("+{count}", "+{count}"),
    "policy": ("policy {policy}", "police {policy}"),
    # --- the claims ------------------------------------------------------------------------------
    "collision": ("collision", "collision"),
    "glass": ("broken glass", "bris de glace"),
    "water": ("water damage", "dégât des eaux"),
    "storm": ("storm", "tempête"),
    "theft": ("theft", "vol"),
    "hail": ("hail", "grêle"),
    "fire": ("fire", "incendie"),
    "policy_unknown": ("policy {policy} is not in the register", "la police {policy} n'est pas au registre"),
    "register_silent": ("the policy register did not answer", "le registre des polices n'a pas répondu"),
    # --- events ----------------------------------------------------------------------------------
    "events": ("events", "événements"),
    "worker_ready": ("worker {worker} (pid {pid}) is ready", "l'agent {worker} (pid {pid}) est prêt"),
    "portal_ready": ("the portal (pid {pid}) starts sending", "le portail (pid {pid}) commence à envoyer"),
    "portal_done": (
        "the portal has sent all {sent} claims, and ends",
        "le portail a envoyé les {sent} sinistres et s'arrête",
    ),
    "failed": (
        "claim {claim}, worker {worker}, attempt {attempt}: {why}; to be tried again",
        "sinistre {claim}, agent {worker}, essai {attempt} : {why} ; à réessayer",
    ),
    "died": (
        "claim {claim} is a dead letter after {attempt} attempts: {why}",
        "sinistre {claim} abandonné après {attempt} essais : {why}",
    ),
    "refused": (
        "claim {claim}: worker {worker} settled too late, and was refused: {why}",
        "sinistre {claim} : l'agent {worker} a conclu trop tard et a été refusé : {why}",
    ),
    "killed_one": (
        "worker {worker} (pid {pid}) killed with SIGKILL while it held claim {claim}",
        "l'agent {worker} (pid {pid}) tué par SIGKILL alors qu'il tenait le sinistre {claim}",
    ),
    "killed_many": (
        "worker {worker} (pid {pid}) killed with SIGKILL while it held {count} claims, from {claim} on",
        "l'agent {worker} (pid {pid}) tué par SIGKILL alors qu'il tenait {count} sinistres, dès le {claim}",
    ),
    "took_over": (
        "worker {worker} took over claim {claim}, attempt {attempt}, after {after}",
        "l'agent {worker} a repris le sinistre {claim}, essai {attempt}, au bout de {after}",
    ),
    "all_taken_over": (
        "all {count} claims of worker {killed} are taken over, the last after {after}",
        "les {count} sinistres de l'agent {killed} sont repris, le dernier au bout de {after}",
    ),
    "handled_again": (
        "claim {claim} was handled again, by worker {worker}: at least once is not exactly once",
        "sinistre {claim} traité à nouveau, par l'agent {worker} : au moins une fois, pas exactement une",
    ),
    "progress": (
        "sent {sent} of {all} · ready {ready}, leased {leased}, delayed {delayed}, dead {dead} · handled {handled}, {rate}/s",
        "envoyés {sent} sur {all} · prêts {ready}, en main {leased}, différés {delayed}, morts {dead} · traités {handled}, {rate}/s",
    ),
    # --- the ledger ------------------------------------------------------------------------------
    "ledger": ("Ledger", "Bilan"),
    "ledger_of": (
        "computed from the journals of {processes} processes, beside the engine's own counters",
        "calculé d'après les journaux de {processes} processus, face aux compteurs du moteur",
    ),
    "journals": ("journals", "journaux"),
    "engine": ("engine", "moteur"),
    "count_sent": ("sent and confirmed", "envoyés et confirmés"),
    "count_received": ("deliveries", "livraisons"),
    "count_acked": ("acknowledged", "acquittés"),
    "count_failed": ("failed or cut off", "échecs et coupures"),
    "count_dead": ("dead letters", "lettres mortes"),
    "count_left": ("left in the queue", "restés en file"),
    "row_sent": ("sent", "envoyés"),
    "row_handled": ("handled", "traités"),
    "row_dead": ("dead letters", "lettres mortes"),
    "row_lost": ("lost", "perdus"),
    "row_doubles": ("handled twice", "traités deux fois"),
    "double_killed": (
        "claim {claim}: worker {first} was killed between its work and its ack; worker {second} did it again",
        "sinistre {claim} : l'agent {first} tué entre son travail et son ack ; l'agent {second} l'a refait",
    ),
    "double_refused": (
        "claim {claim}: worker {first} overslept its lease; worker {second} did it again",
        "sinistre {claim} : l'agent {first} a laissé expirer son bail ; l'agent {second} l'a refait",
    ),
    "double_": (
        "claim {claim}: by worker {first} and worker {second}, and nothing explains it",
        "sinistre {claim} : par l'agent {first} et l'agent {second}, et rien ne l'explique",
    ),
    "dead_letter": (
        "claim {claim}: {error} ({reason}, {attempts} attempts)",
        "sinistre {claim} : {error} ({reason}, {attempts} essais)",
    ),
    "takeover": (
        "worker {killed} was killed holding claim {claim}; worker {worker} took it over {after} later, attempt {attempt}",
        "l'agent {killed} a été tué tenant le sinistre {claim} ; l'agent {worker} l'a repris {after} après, essai {attempt}",
    ),
    "takeovers": (
        "worker {killed} was killed holding {count} claims; others took them over within {after}, claim {claim} first",
        "l'agent {killed} a été tué tenant {count} sinistres ; d'autres les ont repris en {after}, le {claim} d'abord",
    ),
    "killed_at": ("killed", "tué"),
    "more": ("… and {count} more", "… et {count} autres"),
    "exactly_once": (
        "At least once was asked for; for exactly-once effects see “Three guarantees” in README.md.",
        "C'est « au moins une fois » ; pour des effets exactement une fois, voir README.md.",
    ),
    "nobody_killed": (
        "No worker was killed: none was met in the wanted moment.",
        "Aucun agent n'a été tué : aucun n'a été surpris au moment voulu.",
    ),
    "balances": (
        "The ledger balances: {sent} confirmed = {handled} handled + {dead} dead. Nothing is lost.",
        "Le bilan est juste : {sent} confirmés = {handled} traités + {dead} en lettres mortes. Rien n'est perdu.",
    ),
    "balances_overlap": (
        "The ledger balances: each of {sent} confirmed was handled or is dead. Nothing is lost.",
        "Le bilan est juste : chacun des {sent} confirmés est traité ou mort. Rien n'est perdu.",
    ),
    "does_not_balance": ("The ledger does NOT balance:", "Le bilan n'est PAS juste :"),
    "kept": (
        "The queue is kept in {file}. Look into it: {command}",
        "La file est gardée dans {file}. Pour y regarder : {command}",
    ),
    # --- faults ----------------------------------------------------------------------------------
    "fault_not_sent": ("{sent} claims were confirmed, of {planned}", "{sent} sinistres confirmés, sur {planned}"),
    "fault_sent_twice": ("claim {claim} was confirmed twice", "le sinistre {claim} a été confirmé deux fois"),
    "fault_lost": (
        "confirmed, but neither handled nor a dead letter: {claims}",
        "confirmés, mais ni traités ni lettres mortes : {claims}",
    ),
    "fault_double": (
        "claim {claim} was handled twice, and nothing explains it",
        "le sinistre {claim} a été traité deux fois, et rien ne l'explique",
    ),
    "fault_never_sent": (
        "claim {claim} was delivered, but never confirmed to the portal",
        "le sinistre {claim} a été livré, mais jamais confirmé au portail",
    ),
    "fault_never_received": (
        "claim {claim} was worked on by a worker that had not received it",
        "le sinistre {claim} a été traité par un agent qui ne l'avait pas reçu",
    ),
    "fault_acked_but_back": (
        "claim {claim} was acknowledged, and delivered again",
        "le sinistre {claim} a été acquitté, puis livré à nouveau",
    ),
    "fault_handled_and_dead": (
        "claim {claim} was handled, and is a dead letter",
        "le sinistre {claim} a été traité, et c'est une lettre morte",
    ),
    "fault_wordless": (
        "worker {worker} left {claims} claims without a word, and no kill explains it",
        "l'agent {worker} a laissé {claims} sinistres sans mot dire, et nul kill ne l'explique",
    ),
    "fault_count": (
        "{name}: the journals tell {ours}, the engine {theirs}",
        "{name} : les journaux disent {ours}, le moteur {theirs}",
    ),
    # --- other ends ------------------------------------------------------------------------------
    "too_slow": (
        "it did not end within {seconds} s: {handled} of {all} claims are handled. Try fewer (--count, --limit).",
        "pas fini en {seconds} s : {handled} sinistres traités sur {all}. Essayez-en moins (--count, --limit).",
    ),
    "crew_failed": ("a process failed: {why}", "un processus a échoué : {why}"),
    "interrupted": (
        "interrupted: all processes are ended, and the temporary files removed",
        "interrompu : les processus sont arrêtés, et les fichiers temporaires supprimés",
    ),
}


class Voice:
    """Says things in one language."""

    def __init__(self, language: Language) -> None:
        self._place = LANGUAGES.index(language)
        self._point, self._group = (".", ",") if language == "en" else (",", _NO_BREAK)

    def __call__(self, key: str, /, **values: str | int) -> str:
        """Return a text with its values; numbers of claims and processes are names, and written without marks."""
        return TEXTS[key][self._place].format(**values)

    def number(self, value: float, digits: int = 0) -> str:
        """Write a number."""
        return f"{value:,.{digits}f}".translate(str.maketrans(",.", self._group + self._point))

    def euros(self, cents: int) -> str:
        """Write an amount, in whole euros."""
        amount = self.number(cents / 100)
        return f"€{amount}" if self._point == "." else f"{amount}{_NO_BREAK}€"

    def percent(self, share: float) -> str:
        """Write a share of 1."""
        return f"{self.number(share * 100, 1)}{_NO_BREAK}%"

    def span(self, seconds: float) -> str:
        """Write a time that passed."""
        if seconds < 1:
            return f"{self.number(seconds * 1000)}{_NO_BREAK}ms"
        return f"{self.number(seconds, 1)}{_NO_BREAK}s"
