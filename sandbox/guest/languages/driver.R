# R that keeps its variables from one piece of code to the next: see __init__.py. It needs R's own packages alone.
local({
  given <- commandArgs(trailingOnly = TRUE)
  requests <- file(paste0("/proc/self/fd/", given[1]), "rb", raw = TRUE)
  answers <- file(paste0("/proc/self/fd/", given[2]), "wb", raw = TRUE)
  options(warn = 1, device = function(...) grDevices::pdf(NULL)) # Warnings at once; no file of plots that nobody asked for.

  number <- function() {
    digits <- raw()
    while (length(one <- readBin(requests, "raw", 1)) == 1 && one != as.raw(10)) digits <- c(digits, one)
    if (length(one) == 0) quit("no", 0)
    as.integer(rawToChar(digits))
  }

  text <- function() {
    wanted <- number()
    found <- raw()
    while (length(found) < wanted) {
      piece <- readBin(requests, "raw", wanted - length(found))
      if (length(piece) == 0) quit("no", 0)
      found <- c(found, piece)
    }
    one <- rawToChar(found)
    Encoding(one) <- "UTF-8"
    one
  }

  tell <- function(texts) {
    writeBin(charToRaw(paste0(length(texts), "\n")), answers)
    for (one in enc2utf8(texts)) {
      data <- charToRaw(one)
      writeBin(c(charToRaw(paste0(length(data), "\n")), data), answers)
    }
    flush(answers)
  }

  run <- function(code) {
    shown <- character()
    for (expression in parse(text = code, keep.source = FALSE)) {
      value <- withVisible(eval(expression, globalenv()))
      if (value$visible) shown <- c(shown, paste(utils::capture.output(print(value$value)), collapse = "\n"))
    }
    c("ok", shown)
  }

  failed <- function(error) {
    call <- conditionCall(error)
    where <- if (is.null(call)) "" else paste0(" in ", paste(deparse(call), collapse = " "))
    message <- conditionMessage(error)
    c("error", "Error", message, paste0("Error", where, ": ", message))
  }

  repeat {
    texts <- vapply(seq_len(number()), function(i) text(), "")
    changes <- texts[-1]
    set <- grepl("=", changes, fixed = TRUE)
    Sys.unsetenv(changes[!set])
    values <- as.list(sub("^[^=]*=", "", changes[set]))
    names(values) <- sub("=.*", "", changes[set])
    if (length(values) > 0) do.call(Sys.setenv, values)
    answer <- tryCatch(
      run(texts[1]),
      error = failed,
      interrupt = function(condition) c("error", "Interrupted", "The code was interrupted", "")
    )
    flush(stdout())
    tell(answer)
  }
})
